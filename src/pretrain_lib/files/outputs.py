"""Decide, for all commands, whether they may write where the user says."""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from pretrain_lib.files.reading import read_object

# Where the console of a job goes; such files may lie in a folder before a run begins.
CONSOLE_SUFFIXES = (".log", ".out", ".err")
SHOWN = 3  # how many foreign files an error names


def check_folder(
    folder: Path, *, named: str, kind: str, is_ours: Callable[[Path], bool], replaced: bool = False
) -> None:
    """Raise ValueError unless a folder can be made or written, and is empty or `is_ours` of it.

    `named` introduces the folder in an error, such as `--out `, and `kind` is what would be
    written, such as "a run". Hidden files and logs of the console stay as they are, so they do not
    count, unless the folder is `replaced` as a whole.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{named}{folder} is a file: give the path of a folder")
    try:
        foreign = foreign_files(folder, hidden=replaced)
        if foreign and is_ours(folder):
            return  # a disk that is full now may have room when it is needed
        if foreign:
            ellipsis = ", ..." if len(foreign) > SHOWN else ""
            raise ValueError(
                f"{named}{folder} is neither empty nor {kind}: it holds "
                f"{', '.join(foreign[:SHOWN])}{ellipsis}; give a new folder"
            )
        _try_to_write(folder, named)
    except OSError as error:
        raise ValueError(f"{named}{folder} cannot be written: {error}") from error


def check_file(path: Path, *, named: str, holds: Sequence[str] = ()) -> None:
    """Raise ValueError unless a file can be written at `path`; what is there stays as it is.

    With `holds`, a file that is there must be a JSON object with these fields, as an earlier result
    is: others are the user's own.
    """
    if holds and path.is_file() and not _is_object_with(path, holds):
        raise ValueError(f"{named}{path} is there, and no result of this command: give a new path")
    if path.is_dir():
        raise ValueError(f"{named}{path} is a folder: give the path of a file")
    try:
        if path.exists():
            with path.open("ab"):
                pass
        _try_to_write(path.parent, named, path)
    except OSError as error:
        raise ValueError(f"{named}{path} cannot be written: {error}") from error


def _is_object_with(path: Path, fields: Sequence[str]) -> bool:
    try:
        return set(fields) <= read_object(path).keys()
    except (OSError, ValueError):
        return False


def foreign_files(folder: Path, *, hidden: bool = False) -> list[str]:
    """Return the names in a folder that are neither hidden nor logs of the console, in order."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    visible = [n for n in names if not n.startswith(".") and not n.endswith(CONSOLE_SUFFIXES)]
    return names if hidden else visible


def _try_to_write(folder: Path, named: str, path: Path | None = None) -> None:
    """Write and remove a file in a folder, or in the nearest one above it that exists."""
    path = path or folder
    above = next(f for f in (folder.absolute(), *folder.absolute().parents) if f.exists())
    if not above.is_dir():
        raise ValueError(f"{named}{path} cannot be written: {above} is a file; give another path")
    longest = max(len(os.fsencode(part)) for part in path.parts)
    if longest > os.pathconf(above, "PC_NAME_MAX"):
        raise ValueError(f"{named}{path} cannot be written: a name of it is too long")
    with tempfile.TemporaryFile(dir=above) as file:
        file.write(b"\0")
        file.flush()
