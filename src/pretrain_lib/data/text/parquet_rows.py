"""Read the documents of `.parquet` files: one per row of a column of text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain_lib.data.text.documents import Document, FileSlice, Rejected, unreadable
from pretrain_lib.wording import show_path

ROWS_AT_ONCE = 256  # batch size


def cut_parquet(path: Path, size: int, text_field: str) -> list[FileSlice]:
    """Split a file between row groups into slices of about `size` bytes of text."""
    groups = _open(path, text_field).metadata
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


def read_rows(piece: FileSlice, text_field: str) -> Iterator[Document | Rejected]:
    """Yield a document per row, an empty one for a null.

    Raises ValueError for a damaged file.
    """
    import pyarrow as pa

    file, row = _open(piece.path, text_field), 0
    groups = range(piece.start, piece.stop)
    try:
        for batch in file.iter_batches(ROWS_AT_ONCE, groups, columns=[text_field]):
            column = batch.column(batch.schema.get_field_index(text_field))  # of a.b comes a, too
            for text in _values(column):
                if isinstance(text, UnicodeDecodeError):
                    where = f"{show_path(piece.path)}, row {row} from row group {piece.start} on"
                    yield Rejected(where, "the text is not UTF-8", text.reason)
                else:
                    yield Document(text or "")
                row += 1
    except (OSError, pa.ArrowException) as error:
        place = f"in row groups {piece.start} to {piece.stop}, after row {row}"
        raise unreadable(piece.path, place, error) from error


def _values(column: Any) -> list[str | None | UnicodeDecodeError]:
    """Return the texts of a column; the error for one that is not UTF-8."""
    try:
        values = column.to_pylist()
        return [value.decode() if isinstance(value, bytes) else value for value in values]
    except UnicodeDecodeError:
        return [_value(value) for value in column]


def _value(value: Any) -> str | None | UnicodeDecodeError:
    try:
        text = value.as_py()
        return text.decode() if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        return error


def _open(path: Path, text_field: str):  # noqa: ANN202 (imported lazily)
    import pyarrow as pa
    from pyarrow import parquet

    shown = show_path(path)
    try:
        # pyarrow takes no name that is not UTF-8, and opens no URL.
        is_plain = isinstance(path, Path) and shown == str(path)
        opened = path if is_plain else path.open("rb")
        # Some writers add a checksum to each page, without which damage may go unseen.
        file = parquet.ParquetFile(opened, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise unreadable(path, "as .parquet", error) from error
    schema = file.schema_arrow
    if text_field not in schema.names:
        raise ValueError(
            f"data.text_field={text_field!r} is not a column of {shown}; its columns are "
            f"{', '.join(schema.names)}"
        )
    if (count := schema.names.count(text_field)) > 1:
        raise ValueError(
            f"data.text_field={text_field!r}: {shown} has {count} columns of this name; rename one"
        )
    kind = schema.field(schema.get_field_index(text_field)).type
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    strings = pa.string(), pa.large_string(), pa.string_view()
    if inner not in (*strings, pa.binary(), pa.large_binary(), pa.binary_view(), pa.null()):
        raise ValueError(
            f"data.text_field={text_field!r}: this column of {shown} holds {kind}, not strings"
        )
    return file
