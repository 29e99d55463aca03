"""Errors that end a run: what is printed, and what `status.json` records."""

import errno
import os
import re
import sys
from pathlib import Path

from pretrain_lib.errors import LocalFault, is_disk_full, raised_here
from pretrain_lib.run_folder.layout import CHECKPOINTS, ERRORS
from pretrain_lib.run_folder.status import read_status, write_status
from pretrain_lib.wording import in_line

# Matches the messages of gloo, NCCL and torch's store about a lost or unresponsive process.
PEER_LOST = re.compile(r"(?i)timed? ?out|connection (closed|reset|refused)|peer")


def state_after(error: BaseException) -> str:
    """Return the state of a run that an error has ended."""
    if isinstance(error, KeyboardInterrupt) or is_disk_full(error):
        return "resumable"
    refused = isinstance(error, ValueError) and raised_here(error)
    return "refused" if refused and not isinstance(error, LocalFault) else "failed"


def remark_on(error: BaseException, folder: Path) -> str | None:
    """Return the line that is said of an error in a run's `folder`, None if others say it.

    Its cause may be the data, the numbers, the disk, a lost process, or a bug of this library.
    """
    if isinstance(error, OSError) and not folder.is_dir():
        return (
            f"run.dir={folder} is gone ({error}): somebody has moved or deleted it; put it back "
            f"and start again, the run goes on from its newest checkpoint"
        )
    if isinstance(error, LocalFault | FloatingPointError):
        return str(error)
    if is_disk_full(error):
        return f"{error}: make room and start again, the run {_goes_on(folder)}"
    if isinstance(error, OSError):
        hint = {errno.EACCES: "give the permission", errno.EROFS: "make it writable"}
        remedy = hint.get(error.errno, "look at the disk and at the log of the kernel")
        return f"{error}: {remedy}; started again, the run {_goes_on(folder)}"
    if isinstance(error, RuntimeError) and PEER_LOST.search(str(error)):
        return (
            f"process {os.environ.get('RANK', 0)} lost another one, or waited for it longer than "
            f"system.collective_timeout: what that one printed tells why. "
            f"Started again, the run {_goes_on(folder)}"
        )
    return None


def _goes_on(folder: Path) -> str:
    there_is = any((folder / CHECKPOINTS).glob("step-*"))
    return "goes on from its newest checkpoint" if there_is else "begins anew: it has no checkpoint"


def write_last_status(folder: Path, state: str, error: BaseException) -> None:
    """Write how a run has ended to `status.json`, or say that it could not be written."""
    if not folder.is_dir():
        return
    step, reason = read_status(folder).get("step"), in_line(f"{type(error).__name__}: {error}")
    diverged = isinstance(error, FloatingPointError)  # as it would again
    try:
        write_status(folder, state, step=step, reason=reason, is_over=diverged)
    except OSError as problem:
        print(f"error: status.json could not be written either: {problem}", file=sys.stderr)


def error_log(folder: Path) -> Path:
    """Return the file in a run folder for the traceback of a bug; each process has its own."""
    rank = int(os.environ.get("RANK", 0))
    return folder / (ERRORS if rank == 0 else ERRORS.replace(".", f"-{rank}."))
