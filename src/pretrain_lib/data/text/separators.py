"""Split a text file into documents at lines that hold a separator, such as `<|endoftext|>`."""

import codecs
import io
import shlex
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path

from pretrain_lib.data.text.compression import FORMATS, CompressedFile, MemberError
from pretrain_lib.data.text.documents import Document, FileSlice, Rejected, shortened
from pretrain_lib.wording import show_path

READ_BYTES = 2**20
HINT_BYTES, HINT_FILES = 2**18, 100  # how much is searched for lines that look like separators
KNOWN_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


def check_separator(separator: str) -> None:
    """Raise ValueError unless `separator` is a line of text."""
    if not separator.strip() or separator.splitlines() != [separator]:
        raise ValueError(
            f"data.document_separator={separator!r} must be a line of text without its line break, "
            f"such as <|endoftext|>"
        )


def find_separator_line(
    data: bytes, separator: bytes, start: int, *, is_whole: bool
) -> tuple[int, int] | None:
    """Return where the next line equal to `separator` begins and where the line after it does.

    `is_whole` says whether the file ends where `data` does; otherwise a line without its end is
    left for later.
    """
    while (start := data.find(separator, start)) >= 0:
        end = start + len(separator)
        if start == 0 or data[start - 1] == ord("\n"):
            rest = data[end : end + 2]
            if rest[:1] == b"\n":
                return start, end + 1
            if rest == b"\r\n" or (is_whole and rest in (b"", b"\r")):
                return start, end + len(rest)
        start += 1
    return None


def read_separated(
    file: io.BufferedIOBase, piece: FileSlice, separator: str, *, to_end: bool
) -> Iterator[Document | Rejected]:
    """Yield the documents that begin in a slice: behind a separator line, or at byte 0.

    The line break before a separator is no part of the document; `to_end` reads on to the end of
    the file whatever the slice (a compressed file).
    """
    line = separator.encode()
    # The byte before tells whether a line begins at `start`; a byte order mark is in no line.
    begin, data = piece.start - 1, b""
    if begin < len(codecs.BOM_UTF8):
        begin, data = 0, file.read(len(codecs.BOM_UTF8))
        if data == codecs.BOM_UTF8:
            begin, data = len(data), b""
    else:
        file.seek(begin)
    offset, is_whole = begin, False  # `offset` is the place of `data` in the file
    file_start = begin  # of the first slice: behind the mark
    searched, opened = max(piece.start - begin, 0), 0 if piece.start == 0 else None
    while True:
        found = find_separator_line(data, line, searched, is_whole=is_whole)
        if found is None and not is_whole:
            if opened is None and not to_end and offset + len(data) > piece.stop + len(line) + 2:
                return  # no document begins here
            searched = max(searched, len(data) - len(line) - 2)
            more = file.read(max(READ_BYTES, len(data)))
            # What lies before an open document is dropped; one byte stays, the line break.
            kept = max((searched if opened is None else opened) - 1, 0)
            data, offset, is_whole = data[kept:] + more, offset + kept, not more
            if is_whole and not to_end and offset + len(data) < piece.stop:
                raise shortened(piece)
            searched, opened = searched - kept, None if opened is None else opened - kept
            continue
        stop, following = found or (len(data), len(data))
        at_edge = stop == opened and (offset + stop == file_start or found is None)
        if opened is not None and not at_edge:
            raw = data[opened:stop]
            raw = raw[: -2 if raw.endswith(b"\r\n") else -1] if found and raw else raw
            yield _decode(raw, piece.path, offset + opened)
        if found is None or (not to_end and offset + stop >= piece.stop):
            return
        opened = searched = following


def _decode(raw: bytes, path: Path, offset: int) -> Document | Rejected:
    try:
        return Document(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        where = f"{show_path(path)}, document at byte {offset}"
        return Rejected(where, "the text is not UTF-8", f"{error.reason} at byte {error.start}")


def hint_at_separator(files: Sequence[Path], *end_of_text: str) -> str | None:
    """Return a hint if a text file has lines that look like separators of documents.

    `end_of_text` adds spellings, such as that of a tokenizer, to those that are known.
    """
    for path in files[:HINT_FILES]:
        data = _first_bytes(path)
        for separator in dict.fromkeys([*end_of_text, *KNOWN_SEPARATORS]):
            if find_separator_line(data, separator.encode(), 0, is_whole=len(data) < HINT_BYTES):
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
        if place >= 0 and not find_separator_line(data, line, place, is_whole=is_whole):
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
