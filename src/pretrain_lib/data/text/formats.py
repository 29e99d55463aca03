"""Split text files into slices and read their documents: `.txt`, JSON Lines, `.parquet`.

Each slice is read independently, so slices can be distributed over processes.
"""

import codecs
import contextlib
import hashlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
LINE_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
SUFFIXES = (".txt", ".parquet", *LINE_SUFFIXES)
EXPANSION = 4  # assumed ratio of the size of a text to its compressed size
ROWS_AT_ONCE = 256  # batch size for reading a .parquet file
# A text may be split here without changing its tokens: every pre-tokenizer of the GPT family splits
# between a letter or digit and the space or newline that follows it.
CUT = re.compile(rb"[A-Za-z0-9](?=[ \n])")
CUT_SEARCH_BYTES = 2**16
DIGEST_BYTES = 2**20  # how much of a split file is hashed to identify it
LINE_PART_BYTES = 2**20  # how much of a skipped line is read at once


class Document(NamedTuple):
    """A document, or a part of one whose file was so large that it was split."""

    text: str
    begins: bool = True
    """Whether `text` includes the beginning of the document."""
    ends: bool = True
    """Whether `text` includes the end of the document."""
    digest: bytes | None = None
    """Identifies the whole document if `text` is a part of it."""

    @property
    def is_blank(self) -> bool:
        """Whether this is a whole document of white space only; a part of one is never blank."""
        return self.begins and self.ends and not self.text.strip()


class Rejected(NamedTuple):
    """A document that could not be read."""

    where: str
    reason: str


@dataclass(frozen=True)
class FileSlice:
    """A part of a file: bytes `[start, stop)`, or row groups `[start, stop)` of a `.parquet`.

    A line belongs to the slice in which it begins; a compressed file is a single slice.
    """

    path: Path
    start: int
    stop: int
    text_bytes: int  # approximate


def is_readable(path: Path) -> bool:
    """Return whether a file has the suffix of a supported format."""
    return path.name.endswith(SUFFIXES)


def is_one_document(path: Path) -> bool:
    """Return whether a file is one document, as `.txt` is."""
    return path.suffix != ".parquet" and not path.name.endswith(LINE_SUFFIXES)


def cut_file(path: Path, size: int, *, text_field: str, cut_text: bool) -> list[FileSlice]:
    """Split a file into slices of about `size` bytes of text, as far as its format allows.

    `cut_text` says whether a file that is one document may be split too.
    """
    end = path.stat().st_size
    if path.suffix == ".parquet":
        return _cut_parquet(path, size, text_field)
    if path.suffix in COMPRESSIONS:
        return [FileSlice(path, 0, end, end * EXPANSION)]
    if is_one_document(path) and not cut_text:
        return [FileSlice(path, 0, end, end)]
    starts = range(0, end, size)
    return [FileSlice(path, s, min(s + size, end), min(size, end - s)) for s in starts]


def read_documents(piece: FileSlice, text_field: str) -> Iterator[Document | Rejected]:
    """Yield the documents of a slice, including empty ones."""
    if piece.path.suffix == ".parquet":
        yield from _parquet_rows(piece, text_field)
    elif is_one_document(piece.path):
        yield from _text(piece)
    else:
        yield from _lines(piece, text_field)


def is_text(value: object) -> bool:
    """Return whether a value is a string that UTF-8 can encode.

    JSON and Python strings may contain lone surrogates, which it cannot.
    """
    try:
        value.encode()
    except (AttributeError, UnicodeEncodeError):
        return False
    return True


def _text(piece: FileSlice) -> Iterator[Document | Rejected]:
    with piece.path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        start, stop = _next_cut(file, piece.start, size), _next_cut(file, piece.stop, size)
        if start == stop and size:
            return  # no cut within this slice: its text belongs to the previous slice
        file.seek(start)
        raw = file.read(stop - start)
        is_part = (start, stop) != (0, size)
        file.seek(0)
        digest = hashlib.blake2b(file.read(DIGEST_BYTES) + str(size).encode()).digest()
    where = f"{piece.path}, bytes {start} to {stop}" if is_part else str(piece.path)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        yield Rejected(where, f"the text is not UTF-8 ({error.reason} at byte {error.start})")
        return
    text = text.removeprefix("\ufeff") if start == 0 else text
    yield Document(text, start == 0, stop == size, digest if is_part else None)


def _next_cut(file: io.BufferedReader, position: int, size: int) -> int:
    """Return the first offset from `position` on where a file may be split, or its end."""
    while 0 < position < size:
        file.seek(position - 1)
        if match := CUT.search(file.read(CUT_SEARCH_BYTES)):
            return position - 1 + match.end()
        position += CUT_SEARCH_BYTES - 2
    return min(position, size)


def _lines(piece: FileSlice, text_field: str) -> Iterator[Document | Rejected]:
    if (compression := COMPRESSIONS.get(piece.path.suffix)) is None:
        with piece.path.open("rb") as file:
            yield from _lines_of_slice(file, piece, text_field)
        return
    from pyarrow import input_stream

    with io.BufferedReader(input_stream(str(piece.path), compression=compression)) as file:
        number = 0
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _parse_line(line, f"{piece.path}, line {number}", text_field)
        except OSError as error:
            yield Rejected(f"{piece.path}, after line {number}", f"the file is damaged ({error})")


def _lines_of_slice(
    file: io.BufferedReader, piece: FileSlice, text_field: str
) -> Iterator[Document | Rejected]:
    offset = piece.start
    if piece.start:  # skip the rest of a line that began in the previous slice
        offset, rest = file.seek(piece.start - 1), b""
        while offset < piece.stop and not rest.endswith(b"\n"):
            rest = file.readline(LINE_PART_BYTES)
            offset += len(rest)
    while offset < piece.stop and (line := file.readline()):
        if line.strip():
            yield _parse_line(line, f"{piece.path}, line at byte {offset}", text_field)
        offset += len(line)


def _parse_line(line: bytes, where: str, text_field: str) -> Document | Rejected:
    import orjson  # not needed to train on prepared tokens

    with contextlib.suppress(ValueError, KeyError, TypeError):
        if is_text(text := orjson.loads(line.removeprefix(codecs.BOM_UTF8))[text_field]):
            return Document(text)
    reason = f"not a UTF-8 JSON object with text in data.text_field={text_field!r}"
    return Rejected(where, f"{reason}: {line[:60]!r}")


def _cut_parquet(path: Path, size: int, text_field: str) -> list[FileSlice]:
    groups = _open_parquet(path, text_field).metadata
    # A field nested in another column may have the same name, but not the same path.
    paths = [groups.schema.column(i).path for i in range(groups.num_columns)]
    index = paths.index(text_field)
    slices, start, filled = [], 0, 0
    for group in range(groups.num_row_groups):
        filled += groups.row_group(group).column(index).total_uncompressed_size
        if filled >= size or group == groups.num_row_groups - 1:
            slices.append(FileSlice(path, start, group + 1, filled))
            start, filled = group + 1, 0
    return slices


def _open_parquet(path: Path, text_field: str):  # noqa: ANN202 (imported lazily)
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} is not a .parquet file: {error}") from error
    schema = file.schema_arrow
    if text_field not in schema.names:
        raise ValueError(
            f"data.text_field={text_field!r} is not a column of {path}; its columns are "
            f"{', '.join(schema.names)}"
        )
    kind = schema.field(text_field).type
    if kind not in (pa.string(), pa.large_string(), pa.string_view()):
        raise ValueError(
            f"data.text_field={text_field!r}: this column of {path} holds {kind}, not strings"
        )
    return file


def _parquet_rows(piece: FileSlice, text_field: str) -> Iterator[Document | Rejected]:
    import pyarrow as pa

    file, row = _open_parquet(piece.path, text_field), 0
    groups = range(piece.start, piece.stop)
    try:
        for batch in file.iter_batches(ROWS_AT_ONCE, groups, columns=[text_field]):
            for value in batch.column(0):
                try:
                    yield Document(value.as_py() or "")  # a column may hold nulls
                except UnicodeDecodeError as error:
                    where = f"{piece.path}, row {row} of row groups {piece.start} on"
                    yield Rejected(where, f"the text is not UTF-8 ({error.reason})")
                row += 1
    except (OSError, pa.ArrowException) as error:
        where = f"{piece.path}, row groups {piece.start} to {piece.stop}, after row {row}"
        yield Rejected(where, f"the file is damaged ({error})")
