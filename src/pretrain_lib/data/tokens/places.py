"""Where tokens are: a local path, or a URL that is read by ranges through a block cache."""

import hashlib
import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePosixPath

from pretrain_lib.data.block_cache import GIB, BlockCache, cache_folder
from pretrain_lib.data.remote import (
    RangeReader,
    RemoteFile,
    Unreachable,
    answer,
    check_part,
    check_version,
    describe_file,
    is_url,
    refuse_secrets,
    storage_of,
    version_of,
)
from pretrain_lib.data.tokens.handle import Handle

CACHED_BYTES = 2**20  # a block: a multiple of those that have a checksum
DEFAULT_CACHE_GIB = 20
SETTING = "data.path"


def open_place(name: str | Path, *, cache_gib: float = DEFAULT_CACHE_GIB) -> "Place":
    """Return the place of tokens that a path or URL names.

    Up to `cache_gib` GiB of blocks of remote files are kept on the local disk. Raises ValueError
    for a URL with credentials, and for one of no known storage.
    """
    if not isinstance(name, str) or not is_url(name):
        return name if isinstance(name, RemotePath) else Path(name).expanduser()
    refuse_secrets(name, setting=SETTING)
    storage, _ = storage_of(name, setting=SETTING)
    storage.invalidate_cache()  # what was listed before may have changed
    cache = BlockCache(cache_folder() / "blocks", int(cache_gib * GIB))
    return RemotePath(name.rstrip("/"), cache)


@dataclass(frozen=True, order=True)
class RemotePath:
    """A file or folder behind a URL; reads like a `pathlib.Path`."""

    url: str
    cache: BlockCache = field(compare=False, repr=False)
    _infos: dict[str, dict | None] = field(default_factory=dict, compare=False, repr=False)

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "RemotePath":
        return replace(self, url=f"{self.url}/{name}")

    @property
    def name(self) -> str:
        """The last component."""
        return self.url.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The ending of the name, with its dot."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> "RemotePath":
        """The folder that this is in."""
        return replace(self, url=self.url.rpartition("/")[0])

    def with_name(self, name: str) -> "RemotePath":
        """Return the file of another name in the same folder."""
        return self.parent / name

    def with_suffix(self, suffix: str) -> "RemotePath":
        """Return the file of the same name with another ending."""
        return self.parent / (self.name.removesuffix(self.suffix) + suffix)

    def expanduser(self) -> "RemotePath":
        """Return this."""
        return self

    def is_file(self) -> bool:
        """Return whether there is a file."""
        return (self._info() or {}).get("type") == "file"

    def is_dir(self) -> bool:
        """Return whether there is a folder."""
        return (self._info() or {}).get("type") == "directory"

    def stat(self) -> RemoteFile:
        """Return what has the size; raises ValueError if there is no file."""
        if (info := self._info()) is None:
            raise ValueError(f"{SETTING}={self.url}: there is no such file or folder")
        return describe_file(self.url, info, setting=SETTING)

    def glob(self, pattern: str) -> Iterator["RemotePath"]:
        """Yield the files of this folder whose names match a pattern, hidden ones only if it asks.

        As in a shell, a name that begins with a dot is matched by a pattern that does.
        """
        storage, key = storage_of(self.url, setting=SETTING)
        try:
            infos = answer(self.url, partial(storage.ls, key, detail=True), setting=SETTING)
        except Unreachable:
            raise
        except ValueError:  # there is no such folder
            return
        for info in infos:
            name = info["name"].rstrip("/").rpartition("/")[2]
            is_hidden = name.startswith(".") and not pattern.startswith(".")
            if info["type"] == "directory" or is_hidden or not fnmatchcase(name, pattern):
                continue
            if info.get("size") is not None and version_of(info):  # else it is asked for
                self._infos[f"{self.url}/{name}"] = info
            yield self / name

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """Open the file for reading at any place."""
        assert mode == "rb", "remote files are read only"
        return io.BufferedReader(RangeReader(RemoteHandle(self).read, self.stat().st_size))

    def read_bytes(self) -> bytes:
        """Return the whole content."""
        return RemoteHandle(self).read(0, self.stat().st_size)

    def read_text(self, encoding: str) -> str:
        """Return the whole content as text."""
        return self.read_bytes().decode(encoding)

    def _info(self) -> dict | None:
        """Return what the storage says of this file or folder, None if there is nothing."""
        if self.url not in self._infos:
            storage, key = storage_of(self.url, setting=SETTING)
            try:
                info = answer(self.url, partial(storage.info, key), setting=SETTING)
            except Unreachable:
                raise
            except ValueError:
                info = None
            self._infos[self.url] = info
        return self._infos[self.url]


Place = Path | RemotePath


class RemoteHandle:
    """A remote file for positioned reads from several threads, through the block cache."""

    def __init__(self, path: RemotePath) -> None:
        self.path, self._file = path, path.stat()
        self._versions = {self._file.version}
        identity = f"{path.url}|{self._file.st_size}|{self._file.version}"
        self._key = hashlib.sha256(identity.encode()).hexdigest()[:32]

    def read(self, start: int, count: int) -> bytes:
        """Return bytes `[start, start + count)`, fewer at the end of the file.

        Raises ValueError if the storage does not answer, or has another file there by now.
        """
        stop, parts = min(start + count, self._file.st_size), []
        while start < stop:
            number, offset = divmod(start, CACHED_BYTES)
            size = min(CACHED_BYTES - offset, stop - start)
            part = self.path.cache.read(self._key, number, offset, size)
            if part is None or len(part) != size:
                part = self._fetch(number)[offset : offset + size]
            parts.append(part)
            start += size
        return b"".join(parts)

    def _fetch(self, number: int) -> bytes:
        start = number * CACHED_BYTES
        stop = min(start + CACHED_BYTES, self._file.st_size)
        storage, key = storage_of(self.path.url, setting=SETTING)
        ask = partial(storage.cat_file, key, start=start, end=stop)
        block = answer(self.path.url, ask, setting=SETTING)
        remedy = "start again with what is there now, or put the file back"
        check_part(self.path.url, block, stop - start, remedy, setting=SETTING)
        # Before it is kept as a block of the file that was opened.
        check_version(self._file, self._versions, remedy, setting=SETTING)
        self.path.cache.write(self._key, number, block)
        return block


def open_handle(path: Place) -> Handle | RemoteHandle:
    """Open a file for positioned reads from several threads."""
    return RemoteHandle(path) if isinstance(path, RemotePath) else Handle(path)


@contextmanager
def on_disk(folder: Place, names: list[str]) -> Iterator[Path]:
    """Yield a local folder with these files of a folder: itself, or a copy of a remote one."""
    if isinstance(folder, Path):
        yield folder
        return
    with tempfile.TemporaryDirectory() as copy:
        for name in names:
            Path(copy, name).write_bytes((folder / name).read_bytes())
        yield Path(copy)
