"""Read compressed files as their tools do: several members, padding, long zstd windows."""

import bz2
import io
import lzma
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pretrain_lib.data.text.documents import RESTORE, Rejected
from pretrain_lib.wording import show_path

READ_BYTES = 2**14  # compressed bytes at once: what they expand to is held in memory
BUFFER_BYTES = 2**20
WINDOW_BYTES = 2**31  # the largest window of the zstd command, which a worker then needs as memory
ZSTD_DICTIONARY = "ictionary mismatch"  # in the message of zstd without the right one
ZSTD_MEMORY = "requires too much memory"  # in the message of zstd for a larger window
TRAILING = "bytes behind the end of the compressed data are ignored"


class _Format(NamedTuple):
    new: Callable[[], Any]
    """Makes a decompressor of one member, with `decompress`, `eof` and `unused_data`."""
    starts: tuple[bytes, ...]
    """The first bytes of a member."""


def _new_zstd() -> Any:
    import zstandard  # not needed to train on prepared tokens

    return zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES).decompressobj()


ZSTD_SKIPPED = tuple(bytes([first, 0x2A, 0x4D, 0x18]) for first in range(0x50, 0x60))
FORMATS = {
    ".gz": _Format(lambda: zlib.decompressobj(wbits=31), (b"\x1f\x8b",)),
    ".zst": _Format(_new_zstd, (b"\x28\xb5\x2f\xfd", *ZSTD_SKIPPED)),
    ".xz": _Format(lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), (b"\xfd7zXZ\0",)),
    ".bz2": _Format(bz2.BZ2Decompressor, (b"BZh",)),
}


def compression_of(start: bytes) -> str | None:
    """Return the ending of compressed files that begin so, None for text."""
    if re.match(rb"BZh[1-9]1AY&SY", start):
        return ".bz2"
    kinds = (suffix for suffix in FORMATS if suffix != ".bz2")
    return next((kind for kind in kinds if start.startswith(FORMATS[kind].starts[0])), None)


class MemberError(ValueError):
    """Says why compressed data cannot be read, and what to do."""

    remedy = RESTORE


class WindowError(MemberError):
    """Says that decompression needs too much memory."""

    remedy = "compress it again with --long=31 or less"


class DictionaryError(MemberError):
    """Says that decompression needs the dictionary of the compression."""

    remedy = "decompress it with that dictionary (zstd -d -D DICTIONARY)"


class UncompressedError(MemberError):
    """Says that data are not compressed."""

    remedy = "restore the file, or rename it if it was decompressed"


class CompressedFile(io.RawIOBase):
    """The decompressed content of a file of one or more members.

    Zero bytes behind a member are padding, as for `gzip -dc`; anything else there sets `trailing`.
    Reading raises MemberError for a damaged or truncated file.
    """

    def __init__(self, path: Path) -> None:
        self.trailing = False
        self._path = path
        self._file = path.open("rb")
        self._format = FORMATS[path.suffix.lower()]
        self._member: Any = None  # the decompressor of the member that is read, None between two
        self._is_first = True
        self._input, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: memoryview) -> int:
        """Fill `buffer` with decompressed bytes and return their number, 0 at the end."""
        while not self._ready and self._advance():
            pass
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def start(self, size: int) -> bytes:
        """Return the first `size` bytes of the content, or all of it, before it is read."""
        found = b""
        while len(found) < size and self._advance():
            found += self._ready
        self._ready = memoryview(found)
        return found[:size]

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()

    def _advance(self) -> bool:
        """Decompress the next bytes; return False at the end of the file."""
        if self._member is None and not self._begin_member():
            return False
        data = self._input or self._file.read(READ_BYTES)
        if not data:
            raise MemberError("the compressed data is truncated")
        try:
            self._ready = memoryview(self._member.decompress(data))
        except Exception as error:  # each library has its own type
            if ZSTD_MEMORY in str(error):
                window = f"its zstd window is larger than {WINDOW_BYTES >> 20} MiB"
                raise WindowError(window) from error
            if ZSTD_DICTIONARY in str(error):
                raise DictionaryError("it was compressed with a dictionary") from error
            raise MemberError(error) from error
        self._input = b""
        if self._member.eof:
            self._input, self._member = self._member.unused_data, None
        return True

    def _begin_member(self) -> bool:
        data = self._input
        longest = max(map(len, self._format.starts))
        while len(data := data if self._is_first else data.lstrip(b"\0")) < longest:
            if not (more := self._file.read(READ_BYTES)):
                break
            data += more
        self._input = data
        if not data:
            if self._is_first:
                raise MemberError("the compressed data is truncated: the file is empty")
            return False
        if not data.startswith(self._format.starts):
            if self._is_first:
                raise UncompressedError(f"it does not begin like a {self._name} file")
            self.trailing = True
            return False
        self._member, self._is_first = self._format.new(), False
        return True

    @property
    def _name(self) -> str:
        return self._path.suffix.lower()

    def size(self) -> int:
        """Return the size of the compressed file, whose end has been read."""
        return self._file.seek(0, io.SEEK_END)

    def warning(self) -> Rejected | None:
        """Return a warning if bytes behind the last member were ignored."""
        return Rejected(show_path(self._path), TRAILING, documents=0) if self.trailing else None
