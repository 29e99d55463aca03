"""Read JSON files: damage of every kind is one error that names the file."""

import json
import warnings
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pretrain_lib.wording import in_line

RESTORE = "restore the file"


def parse_json(raw: bytes, *, pairs: Callable[[list[tuple]], Any] | None = None) -> Any:
    """Return the value of a JSON text in UTF-8; raises ValueError for whatever is none.

    `pairs` makes an object of its names and values, as `object_pairs_hook` of `json.loads`.
    """
    try:
        return json.loads(raw.decode(), object_pairs_hook=pairs)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_object(path: Path, *, remedy: str = RESTORE) -> dict:
    """Return the object in a JSON file; raises ValueError, naming file and remedy, for others."""
    try:
        content = parse_json(path.read_bytes().removeprefix(BOM_UTF8))
    except ValueError as error:
        raise ValueError(f"{path} is damaged, no JSON ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it must hold a JSON object; {remedy}")
    return content


@contextmanager
def interpreting(path: Path, *, remedy: str = RESTORE) -> Iterator[None]:
    """Raise ValueError, naming file and remedy, if what was read of it has other fields or types.

    For files of ours, in which only damage can have changed them.
    """
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        reason = in_line(f"{type(error).__name__}: {error}")
        raise ValueError(f"{path} is damaged: not what was written ({reason}); {remedy}") from error


def read_if_whole(path: Path) -> dict:
    """Return the object in a JSON file on which no start depends; empty without one.

    A damaged file counts as missing, with a warning that names it.
    """
    if not path.is_file():
        return {}
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        reason = str(error).removesuffix(f"; {RESTORE}")
        warnings.warn(f"ignoring a file that cannot be read: {reason}", stacklevel=2)
        return {}
