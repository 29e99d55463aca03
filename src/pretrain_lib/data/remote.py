"""Storages behind URLs, through `fsspec`: S3, Google Cloud Storage, the Hub, HTTP and others.

A `RemoteFile` has the parts of `pathlib.Path` that readers of text use. Its size and version (an
etag, checksum or time) are those of the listing, so that all processes read the same file.
Credentials come from the environment, as the storage's own library reads them, and are refused in a
URL.
"""

import io
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from pretrain_lib.wording import without_queries

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.:-]+://")
HTTP = ("http://", "https://")
SECRETS = re.compile(r"signature|token|secret|password|credential|key|^sig$", re.IGNORECASE)
# Where the storages say which version of a file this is, those that say it best first.
VERSIONS = (
    *("ETag", "etag", "md5Hash", "content_md5", "checksum", "sha256", "blob_id", "oid"),
    *("mtime", "LastModified", "Content-MD5", "Digest", "md5Checksum", "md5", "xet_hash"),
    *("content_hash", "sha", "hex", "CRC", "generation", "VersionId", "version_id"),
    *("Last-Modified", "last_modified", "modified", "modify", "modifiedTime", "modificationTime"),
    *("server_modified", "last_write_time", "updated", "uploaded_at", "date_time", "created"),
)
CHAIN = "::"  # between the parts of a chained URL of `fsspec`
BLOCK_BYTES = 8 * 2**20  # read at once
MISSING = (404, 410)  # the statuses of HTTP for what is not there
RETRY_SECONDS = (0.5, 2.0)  # between the tries, besides those of the storage's own library
DOWNLOAD = "download it, and give the local copy"
AGAIN = "once it can, start the same command again: what was done until then is kept"


class Unreachable(ValueError):
    """A storage that does not answer, or refuses, or not as is needed to read from it."""


def is_url(name: str) -> bool:
    """Return whether a source is named by a URL."""
    return URL.match(name) is not None


@dataclass(frozen=True, order=True)
class RemoteFile:
    """A file behind a URL; reads like a `pathlib.Path`."""

    url: str
    st_size: int
    """Size in bytes."""
    version: str
    """What changes with the content: an etag, a checksum or a time."""

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last component of the path."""
        if self.url.lower().startswith(HTTP):
            return PurePosixPath(urlsplit(self.url).path or self.url).name
        return PurePosixPath(self.url.partition("?versionId=")[0]).name  # s3fs reads old versions

    @property
    def suffix(self) -> str:
        """The ending of the name, with its dot."""
        return PurePosixPath(self.name).suffix

    def stat(self) -> "RemoteFile":
        """Return what has the size of the file."""
        return self

    def open(self, mode: str = "rb", buffering: int = -1) -> io.BufferedReader:
        """Open the file for reading at any place, `BLOCK_BYTES` or more at once."""
        assert mode == "rb", "remote files are read only"
        storage, key = storage_of(self.url)

        def read(start: int, count: int) -> bytes:
            ask = partial(storage.cat_file, key, start=start, end=start + count)
            data = answer(self.url, ask)
            check_part(self.url, data, count, "prepare it again", setting="data.source")
            return data

        return io.BufferedReader(RangeReader(read, self.st_size), max(BLOCK_BYTES, buffering))


class RangeReader(io.RawIOBase):
    """A file of `size` bytes as `read(start, count)` returns them."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read, self._size, self._position = read, size, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place, and return it."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}
        self._position = start[whence] + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        """Fill `buffer` and return the number of bytes, 0 at the end."""
        count = min(len(buffer), self._size - self._position)
        if count <= 0:
            return 0
        data = self._read(self._position, count)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def storage_of(url: str, *, setting: str = "data.source") -> tuple[Any, str]:
    """Return the file system of a URL, and the path in it."""
    from fsspec.core import url_to_fs

    if CHAIN in url:
        raise ValueError(
            f"{setting}={url.partition(CHAIN)[0]}{CHAIN}...: URLs that are joined, such as that of "
            f"a file in an archive, are not read; {DOWNLOAD}"
        )
    try:
        return url_to_fs(url)
    except (ImportError, OSError) as error:  # OSError: an archive that is not given
        raise ValueError(f"{setting}={url}: {error}") from error
    except ValueError as error:
        raise ValueError(
            f"{setting}={url}: no storage of this protocol is known to fsspec ({error})"
        ) from error


def answer(url: str, ask: Callable[[], Any], *, setting: str = "data.source") -> Any:
    """Return the answer of a storage, asked again after a while if it fails.

    Raises ValueError, naming `setting`, if there is nothing at the URL or no answer.
    """
    for seconds in (*RETRY_SECONDS, None):
        try:
            return ask()
        except Exception as raised:  # each storage has its own types
            error = _cause(url, raised)
            if isinstance(error, FileNotFoundError):
                raise ValueError(f"{setting}={url}: there is no such file or folder") from error
            if seconds is None or isinstance(error, PermissionError):
                raise Unreachable(f"{setting}: {_describe(url, error)}") from error
            time.sleep(seconds)
    return None


def _cause(url: str, error: Exception) -> Exception:
    """Return why a storage failed: `fsspec` says of any failure of HTTP that there is no file."""
    cause = error.__cause__
    is_http = url.lower().startswith(HTTP) and isinstance(error, FileNotFoundError)
    if is_http and cause is not None and getattr(cause, "status", None) not in MISSING:
        return cause
    return error


def _describe(url: str, error: Exception) -> str:
    reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
    return f"{url} cannot be read ({without_queries(reason)}); {AGAIN}"


def version_of(info: dict) -> str:
    """Return what says which version of a file its `info` is of; empty if nothing does."""
    return next((str(info[key]) for key in VERSIONS if info.get(key) not in (None, "")), "")


def describe_file(url: str, info: dict, *, setting: str = "data.source") -> RemoteFile:
    """Return the file at a URL by what its storage says of it.

    Raises ValueError, naming `setting`, if the storage does not say its size or its version.
    """
    size, version = info.get("size"), version_of(info)
    if size is None:
        raise Unreachable(
            f"{setting}={url}: its server does not say how large the file is (no Content-Length, "
            f"or it is compressed on the way), so that it cannot be read in parts; {DOWNLOAD}"
        )
    if not version:
        raise Unreachable(
            f"{setting}={url}: its storage states neither a checksum nor a time of the file, so "
            f"that a changed one could not be told from this; {DOWNLOAD}"
        )
    return RemoteFile(url, int(size), version)


def check_part(url: str, data: bytes, size: int, remedy: str, *, setting: str) -> None:
    """Raise ValueError, naming `setting`, unless a storage sent the `size` bytes asked for."""
    if len(data) > size:
        raise Unreachable(
            f"{setting}: the server of {url} sends the whole file where a part is asked for (it "
            f"knows no Range); {DOWNLOAD}"
        )
    if len(data) < size:
        raise _changed(url, remedy, setting)


def check_version(file: RemoteFile, known: set[str], remedy: str, *, setting: str) -> None:
    """Raise ValueError, naming `setting`, if a file is no longer what it was when it was opened.

    `known` is what the storage was found to write for its version.
    """
    storage, key = storage_of(file.url, setting=setting)
    storage.invalidate_cache(key)  # or it tells what it was told before
    info = answer(file.url, partial(storage.info, key), setting=setting)
    now = describe_file(file.url, info, setting=setting)
    if now.st_size == file.st_size and now.version in known:
        return
    # A listing, which the version may be from, may write the same time or etag in another way.
    if now.st_size != file.st_size or file.version not in _listed_versions(storage, key):
        raise _changed(file.url, remedy, setting)
    known.add(now.version)


def _listed_versions(storage: Any, key: str) -> set[str]:
    """Return the version of a file in the listing of its folder, empty if there is none."""
    folder, _, name = key.rstrip("/").rpartition("/")
    try:
        infos = storage.ls(folder, detail=True)
    except Exception:  # each storage has its own types
        return set()
    return {version_of(info) for info in infos if info["name"].rpartition("/")[2] == name}


def _changed(url: str, remedy: str, setting: str) -> Unreachable:
    return Unreachable(f"{setting}: {url} has changed while it was read; {remedy}")


def refuse_secrets(url: str, *, setting: str = "data.source") -> None:
    """Raise ValueError, naming `setting`, for a URL that holds credentials."""
    parts = urlsplit(url)
    secret = "@" in parts.netloc and parts.scheme != "hf"
    if secret or any(SECRETS.search(name) for name, _ in parse_qsl(parts.query)):
        shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise ValueError(
            f"{setting}={shown}: the URL holds credentials, which would be written into "
            f"manifests and logs; give them by the environment of the storage's own library"
        )
