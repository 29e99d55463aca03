"""Errors of a stream's producer, for the processes that wait for its segments."""

import os
import sys
import traceback
from pathlib import Path

from pretrain_lib.data.tokens.manifests import REMEDY
from pretrain_lib.errors import is_of_disk, raised_here
from pretrain_lib.files.reading import read_object
from pretrain_lib.files.writes import write_json

ERROR = "error.json"
EXIT_BASE = 100  # an exit code above it is that of a producer that could not write the file


def record_error(folder: Path, error: Exception) -> None:
    """Write what the producer failed of to `error.json`, or exit with a code that says it."""
    refused = isinstance(error, ValueError) and raised_here(error)
    number = error.errno if is_of_disk(error) else None
    message = str(error) if refused or number else traceback.format_exc()
    record = {"refused": refused, "errno": number, "message": message, "process": os.getpid()}
    try:
        write_json(folder / ERROR, record)
    except OSError as problem:  # such as a full disk, of which the producer failed as well
        sys.exit(EXIT_BASE + (problem.errno or 0))


def raise_error(folder: Path, *, process: int | None, exit_code: int | None) -> None:
    """Raise what the producer with the id `process`, or any if None, has recorded or ended with."""
    path = folder / ERROR
    error = read_object(path, remedy=REMEDY) if path.is_file() else None
    if error is not None and process in (None, error.get("process")):
        if error["refused"]:
            raise ValueError(error["message"])
        if error.get("errno"):
            raise OSError(error["errno"], f"the stream's producer failed: {error['message']}")
        raise RuntimeError(f"the stream's producer failed: {error['message']}")
    if exit_code is not None and exit_code > EXIT_BASE:
        number = exit_code - EXIT_BASE
        raise OSError(number, f"the stream's producer failed: {os.strerror(number)}", str(folder))
