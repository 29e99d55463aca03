"""What readers of text yield: documents, and remarks about those that could not be read."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pretrain_lib.wording import show_path

LINE_PART_BYTES = 2**20  # how much of a long line is read at once
RESTORE = "restore the file, or move it away"  # the remedy for a damaged file


class Document(NamedTuple):
    """A document, or a part of one whose file was so large that it was split."""

    text: str
    begins: bool = True
    """Whether `text` includes the beginning of the document."""
    ends: bool = True
    """Whether `text` includes the end of the document."""
    digest: bytes | None = None
    """Identifies the whole document if `text` is a part of it."""
    spans: tuple[tuple[int, int], ...] | None = None
    """The `[start, end)` in characters of what counts as targets; None: all of the text."""

    @property
    def is_blank(self) -> bool:
        """Whether this is a whole document of white space only; a part of one is never blank."""
        return self.begins and self.ends and (not self.text or self.text.isspace())


class Rejected(NamedTuple):
    """A document that could not be read, or a warning about a file that was read."""

    where: str
    reason: str
    """The same for all documents that are rejected for one reason."""
    detail: str = ""
    """What was found in this document, such as the beginning of a line."""
    documents: int = 1
    """How many documents are lost: 1, or 0 for a warning."""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}" + (f": {self.detail}" if self.detail else "")


class Fields(NamedTuple):
    """The fields of a JSON line, or columns of a `.parquet`, that are read."""

    text: str = "text"
    spans: str | None = None
    """The field of `Document.spans`, if there is one."""


@dataclass(frozen=True)
class FileSlice:
    """A part of a file: bytes `[start, stop)`, or row groups `[start, stop)` of a `.parquet`.

    A line belongs to the slice in which it begins; a compressed file is a single slice.
    """

    path: Path
    start: int
    stop: int
    text_bytes: int  # approximate


def skip_to_line(file: io.BufferedIOBase, piece: FileSlice) -> int:
    """Skip the rest of a line that began before a slice, up to its end; return where `file` is."""
    if piece.start == 0:
        return 0
    offset, part = file.seek(piece.start - 1), b""
    while offset < piece.stop and not part.endswith(b"\n"):
        if not (part := file.readline(LINE_PART_BYTES)):
            break
        offset += len(part)
    return offset


def is_text(value: object) -> bool:
    """Return whether a value is a string that UTF-8 can encode.

    JSON and Python strings may contain lone surrogates, which it cannot.
    """
    try:
        value.encode()
    except (AttributeError, UnicodeEncodeError):
        return False
    return True


def unreadable(path: Path, place: str, error: Exception, *, remedy: str = RESTORE) -> ValueError:
    """Return the error that refuses a file, such as a damaged one."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ValueError(f"data.source: {show_path(path)} cannot be read {place} ({reason}); {remedy}")


def changed(path: Path | str, how: str) -> ValueError:
    """Return the error that refuses a file which is no longer what it was."""
    return ValueError(
        f"data.source: {show_path(path)} has changed while it was read ({how}); restore it, or "
        f"prepare it again, into another folder, while nothing writes to it"
    )


def shortened(piece: FileSlice) -> ValueError:
    """Return the error that refuses a file which has become shorter since it was cut."""
    return changed(piece.path, f"it ends before byte {piece.stop:,} now")
