"""Split text files into slices and read their documents: `.txt`, JSON Lines, `.parquet`.

`.txt` and JSON Lines may be compressed.

Each slice is read independently, so slices can be distributed over processes.
"""

import codecs
import hashlib
import io
import re
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from pretrain_lib.data.text.compression import (
    BUFFER_BYTES,
    FORMATS,
    CompressedFile,
    MemberError,
)
from pretrain_lib.data.text.documents import (
    Document,
    Fields,
    FileSlice,
    Rejected,
    shortened,
    skip_to_line,
    unreadable,
)
from pretrain_lib.data.text.other_formats import START_BYTES, refuse_other_format
from pretrain_lib.data.text.parquet_rows import cut_parquet, read_rows
from pretrain_lib.data.text.separators import read_separated
from pretrain_lib.wording import show_path

COMPRESSIONS = tuple(FORMATS)
LINE_KINDS = (".jsonl", ".ndjson")
LINE_SUFFIXES = (*LINE_KINDS, *(k + c for k in (*LINE_KINDS, ".json") for c in COMPRESSIONS))
SUFFIXES = (".txt", ".parquet", *LINE_SUFFIXES, *(".txt" + c for c in COMPRESSIONS))
KNOWN = f".txt, .parquet, .jsonl or .ndjson; all but .parquet also with {', '.join(COMPRESSIONS)}"
EXPANSION = 4  # assumed ratio of the size of a text to its compressed size
# A text may be split here without changing its tokens: every pre-tokenizer of the GPT family splits
# between a letter or digit and the space or newline that follows it.
CUT = re.compile(rb"[A-Za-z0-9](?=[ \n])")
CUT_SEARCH_BYTES = 2**16
DIGEST_BYTES = 2**20  # how much of a split file is hashed to identify it


def is_readable(path: Path) -> bool:
    """Return whether a file has the suffix of a supported format, in any case."""
    return path.name.lower().endswith(SUFFIXES)


def is_one_document(path: Path) -> bool:
    """Return whether a file is one document, as `.txt` is."""
    return not path.name.lower().endswith((".parquet", *LINE_SUFFIXES))


def has_lines(path: Path) -> bool:
    """Return whether a file has JSON lines, compressed or not."""
    return path.name.lower().endswith(LINE_SUFFIXES)


def cut_file(
    path: Path, size: int, *, text_field: str, cut_text: bool, separator: str | None = None
) -> list[FileSlice]:
    """Split a file into slices of about `size` bytes of text, as far as its format allows.

    `cut_text` says whether a file that is one document may be split too; `separator`, that it is
    several, between lines of this text.
    """
    end, suffix = path.stat().st_size, path.suffix.lower()
    if suffix == ".parquet":
        return cut_parquet(path, size, text_field)
    if suffix in COMPRESSIONS:
        return [FileSlice(path, 0, end, end * EXPANSION)]
    if is_one_document(path) and not cut_text and separator is None:
        return [FileSlice(path, 0, end, end)]
    starts = range(0, end, size)
    return [FileSlice(path, s, min(s + size, end), min(size, end - s)) for s in starts]


def read_documents(
    piece: FileSlice, fields: Fields, *, separator: str | None = None
) -> Iterator[Document | Rejected]:
    """Yield the documents of a slice, including empty ones.

    Raises ValueError for a damaged or truncated file.
    """
    suffix = piece.path.suffix.lower()
    if suffix == ".parquet":
        yield from read_rows(piece, fields.text)
        return
    if suffix in COMPRESSIONS:
        yield from _compressed(piece, fields, separator)
        return
    if piece.start == 0:
        with piece.path.open("rb") as file:
            refuse_other_format(piece.path, file.read(START_BYTES), is_unpacked=False)
    if not is_one_document(piece.path):
        with piece.path.open("rb", buffering=BUFFER_BYTES) as file:
            lines = _lines_of_slice(file, piece)
            yield from _parse_lines(lines, piece, fields, place="line at byte")
    elif separator is None:
        yield from _text(piece)
    else:
        with piece.path.open("rb", buffering=BUFFER_BYTES) as file:
            yield from read_separated(file, piece, separator, to_end=False)


def _text(piece: FileSlice) -> Iterator[Document | Rejected]:
    with piece.path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        if size < piece.stop:
            raise shortened(piece)
        start, stop = _next_cut(file, piece.start, size), _next_cut(file, piece.stop, size)
        if start == stop and size:
            return  # no cut within this slice: its text belongs to the previous slice
        file.seek(start)
        raw = file.read(stop - start)
        if len(raw) < stop - start:
            raise shortened(piece)
        is_part = (start, stop) != (0, size)
        goes_on = _is_next_part_readable(file, piece, stop, size)
        file.seek(0)
        digest = hashlib.blake2b(file.read(DIGEST_BYTES) + str(size).encode()).digest()
    where = f"{show_path(piece.path)}, bytes {start} to {stop}"
    where = where if is_part else show_path(piece.path)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        yield Rejected(where, "the text is not UTF-8", f"{error.reason} at byte {error.start}")
        if goes_on:  # what follows the gap does not go on where the text before it ended
            yield Document("", True, False, digest)
        return
    text = text.removeprefix("\ufeff") if start == 0 else text
    yield Document(text, start == 0, not goes_on, digest if is_part else None)


def _is_next_part_readable(file: io.BufferedReader, piece: FileSlice, stop: int, size: int) -> bool:
    """Return whether a part of the text follows the one that ends at `stop`, and is UTF-8.

    The parts are read independently, so that each finds out by itself whether its document ends.
    """
    edge, end = piece.stop, stop
    while end == stop < size:
        edge += piece.stop - piece.start
        end = _next_cut(file, edge, size)
    file.seek(stop)
    blocks = (file.read(min(BUFFER_BYTES, end - at)) for at in range(stop, end, BUFFER_BYTES))
    try:
        deque(codecs.iterdecode(blocks, "utf-8"), maxlen=0)
    except UnicodeDecodeError:
        return False
    return stop < size


def _next_cut(file: io.BufferedReader, position: int, size: int) -> int:
    """Return the first offset from `position` on where a file may be split, or its end."""
    while 0 < position < size:
        file.seek(position - 1)
        if match := CUT.search(file.read(CUT_SEARCH_BYTES)):
            return position - 1 + match.end()
        position += CUT_SEARCH_BYTES - 2
    return min(position, size)


def _compressed(
    piece: FileSlice, fields: Fields, separator: str | None
) -> Iterator[Document | Rejected]:
    number, raw = 0, CompressedFile(piece.path)
    with io.BufferedReader(raw, BUFFER_BYTES) as file:
        documents = _unpacked(raw, file, piece, fields, separator)
        while True:
            try:
                document = next(documents, None)
            except MemberError as error:
                place = f"behind document {number:,}"
                raise unreadable(piece.path, place, error, remedy=error.remedy) from error
            if document is None:
                break
            number += 1
            yield document
        if raw.size() < piece.stop:
            raise shortened(piece)
        if warning := raw.warning():
            yield warning


def _unpacked(
    raw: CompressedFile,
    file: io.BufferedReader,
    piece: FileSlice,
    fields: Fields,
    separator: str | None,
) -> Iterator[Document | Rejected]:
    """Yield the documents of a compressed file, which `file` reads from `raw`."""
    refuse_other_format(piece.path, raw.start(START_BYTES), is_unpacked=True)
    if not is_one_document(piece.path):
        yield from _parse_lines(enumerate(file, start=1), piece, fields, place="line")
    elif separator is None:
        yield from _whole_text(file, show_path(piece.path))
    else:
        yield from read_separated(file, piece, separator, to_end=True)


def _whole_text(file: io.BufferedReader, where: str) -> Iterator[Document | Rejected]:
    if not (raw := file.read()):
        return
    try:
        yield Document(raw.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
    except UnicodeDecodeError as error:
        yield Rejected(where, "the text is not UTF-8", f"{error.reason} at byte {error.start}")


def _lines_of_slice(file: io.BufferedReader, piece: FileSlice) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that begin in a slice, each with the byte at which it begins."""
    offset = skip_to_line(file, piece)
    while offset < piece.stop and (line := file.readline()):
        yield offset, line
        offset += len(line)
    if offset < piece.stop:
        raise shortened(piece)


def _parse_lines(
    lines: Iterable[tuple[int, bytes]], piece: FileSlice, fields: Fields, *, place: str
) -> Iterator[Document | Rejected]:
    """Yield the documents of JSON lines, each with its number, of which `place` says what it is."""
    from pretrain_lib.data.text.json_lines import (
        is_blank,
        parse_again,
        parse_line,
        refuse_other_json,
    )

    where, is_first = show_path(piece.path), piece.start == 0
    for number, line in lines:
        if (document := parse_line(line, fields)) is not None:
            yield document
        elif is_blank(line):
            continue
        else:
            if is_first:
                refuse_other_json(line, where)
            yield parse_again(line, f"{where}, {place} {number}", fields)
        is_first = False
