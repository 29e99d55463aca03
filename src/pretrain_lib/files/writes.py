"""Write files so that a crash or a power cut leaves them whole, or as they were before."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STAGING = "pretrain_lib-new"  # ending of hidden files and folders that are being written


def staged(path: Path) -> Path:
    """Return where a file or folder is written before it gets its name."""
    return path.with_name(f".{path.name}.{STAGING}")


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file by fsync and atomic rename: after a crash it is complete or absent."""
    write_files({path: content})


def write_files(contents: dict[Path, bytes | memoryview]) -> None:
    """Write several files of one folder as `write_atomically` does, in any order."""
    temporary = {path: staged(path) for path in contents}
    try:
        for path, content in contents.items():
            with naming(path), temporary[path].open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path in contents:
            temporary[path].replace(path)
    except OSError:
        for path in temporary.values():
            path.unlink(missing_ok=True)
        raise
    flush(next(iter(contents)).parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the path to an error of a file that does not say it, as one of writing does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_json(path: Path, value: object) -> None:
    """Write `value` as JSON, atomically (`write_atomically`)."""
    write_atomically(path, json_bytes(value))


def json_bytes(value: object) -> bytes:
    """Return the content of our JSON files."""
    return (json.dumps(value, indent=1) + "\n").encode()


def make_folder(folder: Path) -> list[Path]:
    """Make a folder and those above it, so that a power cut keeps them; return what was made."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in made:
        flush(path.parent)
    return made


def flush(path: Path) -> None:
    """Fsync a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_to_disk(folder: Path) -> None:
    """Fsync a folder, and all files and folders below it."""
    for path in [*folder.rglob("*"), folder]:
        flush(path)
