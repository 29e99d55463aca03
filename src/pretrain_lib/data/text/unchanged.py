"""Check that the files of a source have not changed since it was opened."""

from collections.abc import Sequence
from pathlib import Path

from pretrain_lib.data.remote import RemoteFile
from pretrain_lib.data.text.documents import changed
from pretrain_lib.data.text.formats import is_readable
from pretrain_lib.data.text.remote import find_remote

State = tuple[int, int | str]


def state_of(path: Path | RemoteFile) -> State:
    """Return the size of a file, and its version or when it was written to, in nanoseconds."""
    if isinstance(path, RemoteFile):
        return path.st_size, path.version
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def check_unchanged(path: Path, before: State) -> None:
    """Raise ValueError if a local file was written to since its state was `before`."""
    if not path.exists():
        raise changed(path, "it is gone")
    if (now := state_of(path)) != before:
        sizes = f"{before[0]:,} bytes before, {now[0]:,} now"
        raise changed(path, sizes if now[0] != before[0] else "it was written to")


def check_versions(url: str, files: Sequence[RemoteFile]) -> None:
    """Raise ValueError if one of the files at or below a URL is no longer there, or another."""
    states = {file.url: state_of(file) for file in find_remote(url, is_readable)[0]}
    for file in files:
        if (now := states.get(file.url)) != state_of(file):
            raise changed(file, "it is gone" if now is None else f"version {now[1]} now")
