"""Read evaluation items: JSON Lines, an object for each item."""

import json
from collections.abc import Iterator
from pathlib import Path

from pretrain_lib.data.text.compression import compression_of
from pretrain_lib.data.text.footers import MAGIC
from pretrain_lib.data.text.other_formats import START_BYTES, archive_of, encoding_of
from pretrain_lib.wording import show_path

# What a file is instead, and what to do.
OTHERS = {
    ".gz": "is compressed by gzip; decompress it, such as by gunzip",
    ".zst": "is compressed by zstd; decompress it, such as by unzstd",
    ".xz": "is compressed by xz; decompress it, such as by unxz",
    ".bz2": "is compressed by bzip2; decompress it, such as by bunzip2",
    "zip": "is a ZIP archive; unpack it, and give the JSON Lines in it",
    "tar": "is a tar archive; unpack it, and give the JSON Lines in it",
    "parquet": "is a Parquet table; write it as JSON Lines, such as by "
    "pandas.read_parquet(FILE).to_json(NEW, orient='records', lines=True)",
}
ARRAY = "is a JSON array; write each of its objects in a line, such as by jq -c '.[]'"
RETURNS = "ends its lines by carriage returns alone; write line feeds, such as by tr '\\r' '\\n'"


def read_records(path: Path) -> Iterator[tuple[int, dict]]:
    """Yield each item with its line, from 1; raises ValueError for what is no JSON Lines."""
    name = show_path(path)
    if not path.is_file():
        raise ValueError(f"items={name}: there is no such file")
    raw = path.read_bytes()
    if (kind := _kind_of(raw)) is not None:
        raise ValueError(f"items={name} {OTHERS[kind]}")
    if (encoding := encoding_of(raw[:START_BYTES])) is not None:
        iconv = f"iconv -f {encoding} -t UTF-8"
        raise ValueError(
            f"items={name} is text in {encoding}; write it in UTF-8, such as by {iconv}"
        )
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            _refuse(name, number, line)
        yield number, record


def _kind_of(raw: bytes) -> str | None:
    """Return which of `OTHERS` a file is by how it begins."""
    kind = compression_of(raw) or archive_of(raw[:START_BYTES])
    return "parquet" if kind is None and raw.startswith(MAGIC) else kind


def _refuse(name: str, number: int, line: bytes) -> None:
    begins = line.removeprefix(b"\xef\xbb\xbf").lstrip()
    if number == 1 and begins.startswith(b"["):
        raise ValueError(f"items={name} {ARRAY}")
    if b"\r" in line.strip():
        raise ValueError(f"items={name} {RETURNS}")
    raise ValueError(
        f"items={name}: line {number} must be a JSON object: {line[:60]!r}; write one in each line"
    )
