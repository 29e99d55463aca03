"""Split a text file into documents at lines that hold a separator, such as `<|endoftext|>`."""

import codecs
import io
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path

from pretrain_lib.data.text.compression import FORMATS, CompressedFile, MemberError
from pretrain_lib.data.text.documents import (
    LINE_PART_BYTES,
    Document,
    FileSlice,
    Rejected,
    shortened,
    skip_to_line,
)
from pretrain_lib.wording import show_path

HINT_BYTES, HINT_FILES = 2**18, 100  # how much is searched for lines that look like separators
KNOWN_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


def check_separator(separator: str) -> None:
    """Raise ValueError unless `separator` is a line of text."""
    if not separator.strip() or separator.splitlines() != [separator]:
        raise ValueError(
            f"data.document_separator={separator!r} must be a line of text without its line break, "
            f"such as <|endoftext|>"
        )


def read_separated(
    file: io.BufferedIOBase, piece: FileSlice, separator: str, *, to_end: bool
) -> Iterator[Document | Rejected]:
    """Yield the documents that begin in a slice: behind a separator line, or at byte 0.

    The line break before a separator is no part of the document; `to_end` reads on to the end of
    the file whatever the slice (a compressed file).
    """
    line = separator.encode()
    separators = {line + end for end in (b"\n", b"\r\n", b"\r", b"")}  # the last two end a file
    part_bytes = LINE_PART_BYTES + len(line)  # which cuts long lines, but no separator
    document, opened = bytearray(), 0 if piece.start == 0 else None
    offset, file_start, begins_line = 0, 0, True
    if piece.start > len(codecs.BOM_UTF8):
        offset = skip_to_line(file, piece)
    while (opened is not None or offset < piece.stop) and (part := file.readline(part_bytes)):
        if offset == 0 and part.startswith(codecs.BOM_UTF8):  # a byte order mark is in no line
            offset = file_start = len(codecs.BOM_UTF8)
            part, opened = part[offset:], None if opened is None else offset
        if begins_line and part in separators and offset >= piece.start:
            if opened is not None and (document or opened > file_start):
                text = document.removesuffix(b"\n").removesuffix(b"\r")
                yield _decode(text, piece.path, opened)
            if not to_end and offset >= piece.stop:
                return
            document, opened = bytearray(), offset + len(part)
        elif opened is not None:
            document += part
        offset += len(part)
        begins_line = part.endswith(b"\n")
    if not to_end and offset < piece.stop:
        raise shortened(piece)
    if document:
        yield _decode(document, piece.path, opened)


def _decode(raw: bytearray, path: Path, offset: int) -> Document | Rejected:
    try:
        return Document(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        where = f"{show_path(path)}, document at byte {offset}"
        return Rejected(where, "the text is not UTF-8", f"{error.reason} at byte {error.start}")


def _has_separator_line(data: bytes, separator: bytes, *, is_whole: bool) -> bool:
    """Return whether a line equals `separator`; only in a whole file may its line break lack."""
    end = rb"\r?(?:\n|\Z)" if is_whole else rb"\r?\n"
    return re.search(b"^" + re.escape(separator) + end, data, re.MULTILINE) is not None


def hint_at_separator(files: Sequence[Path], *end_of_text: str) -> str | None:
    """Return a hint if a text file has lines that look like separators of documents.

    `end_of_text` adds spellings, such as that of a tokenizer, to those that are known.
    """
    for path in files[:HINT_FILES]:
        data = _first_bytes(path)
        for separator in dict.fromkeys([*end_of_text, *KNOWN_SEPARATORS]):
            if _has_separator_line(data, separator.encode(), is_whole=len(data) < HINT_BYTES):
                return (
                    f"hint: {show_path(path)} has lines of {separator} but is read as one "
                    f"document; data.document_separator={shlex.quote(separator)} splits it there"
                )
    return None


def hint_at_missed_separator(files: Sequence[Path], separator: str) -> str | None:
    """Return a hint if a text file has the separator within lines, but is not split by any line."""
    line = separator.encode()
    for path in files[:HINT_FILES]:
        data = _first_bytes(path)
        is_whole = len(data) < HINT_BYTES
        # At the edge of what is searched it is not known whether a line ends.
        place = data.find(line, 0, None if is_whole else -len(line) - len(b"\r\n"))
        if place >= 0 and not _has_separator_line(data, line, is_whole=is_whole):
            among = "" if is_whole else f" of its first {HINT_BYTES:,} bytes"
            return (
                f"hint: {show_path(path)} has {separator} within lines, but no line{among} equals "
                f"it, so that data.document_separator={shlex.quote(separator)} does not split it "
                f"there; that takes a line of its own, without spaces, which ends in a line feed"
            )
    return None


def _first_bytes(path: Path) -> bytes:
    """Return the first `HINT_BYTES` of a text; of a damaged file none, which is told when read."""
    size, data = len(codecs.BOM_UTF8) + HINT_BYTES, b""
    if path.suffix.lower() not in FORMATS:
        with path.open("rb") as file:
            data = file.read(size)
    else:
        with closing(CompressedFile(path)) as packed, suppress(MemberError):
            data = packed.start(size)
    return data.removeprefix(codecs.BOM_UTF8)[:HINT_BYTES]
