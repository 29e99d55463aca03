"""Read evaluation items: JSON Lines, an object for each item."""

import json
from collections.abc import Iterator
from pathlib import Path

from pretrain_lib.wording import show_path

# What the first bytes say a file is instead, and what to do.
OTHERS = {
    b"\x1f\x8b": "is compressed by gzip; decompress it, such as by gunzip",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd; decompress it, such as by unzstd",
    b"\xfd7zXZ\x00": "is compressed by xz; decompress it, such as by unxz",
    b"BZh": "is compressed by bzip2; decompress it, such as by bunzip2",
    b"PK\x03\x04": "is a ZIP archive; unpack it, and give the JSON Lines in it",
    b"PAR1": "is a Parquet table; write it as JSON Lines, such as by "
    "pandas.read_parquet(FILE).to_json(NEW, orient='records', lines=True)",
    b"\xff\xfe": "is text in UTF-16; write it in UTF-8, such as by iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "is text in UTF-16; write it in UTF-8, such as by iconv -f UTF-16 -t UTF-8",
}
ARRAY = "is a JSON array; write each of its objects in a line, such as by jq -c '.[]'"
RETURNS = "ends its lines by carriage returns alone; write line feeds, such as by tr '\\r' '\\n'"


def read_records(path: Path) -> Iterator[tuple[int, dict]]:
    """Yield each item with its line, from 1; raises ValueError for what is no JSON Lines."""
    name = show_path(path)
    if not path.is_file():
        raise ValueError(f"items={name}: there is no such file")
    raw = path.read_bytes()
    for magic, kind in OTHERS.items():
        if raw.startswith(magic):
            raise ValueError(f"items={name} {kind}")
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


def _refuse(name: str, number: int, line: bytes) -> None:
    begins = line.removeprefix(b"\xef\xbb\xbf").lstrip()
    if number == 1 and begins.startswith(b"["):
        raise ValueError(f"items={name} {ARRAY}")
    if b"\r" in line.strip():
        raise ValueError(f"items={name} {RETURNS}")
    raise ValueError(
        f"items={name}: line {number} must be a JSON object: {line[:60]!r}; write one in each line"
    )
