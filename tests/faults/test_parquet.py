"""Damaged `.parquet` files: footers, some of which end the process that reads them, and pages."""

import re
import signal
import subprocess
import sys

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from pretrain_lib.data.text import footers
from pretrain_lib.data.text.opening import open_source
from pretrain_lib.data.text.parquet_rows import cut_parquet, read_rows
from tests.faults.inputs import damaged as damaged_bytes
from tests.faults.inputs import reads, tries

pytestmark = pytest.mark.moderate


@pytest.fixture
def damaged(tmp_path):
    """Two files, the second with a footer of which Arrow may abort, a bit of a count flipped."""
    for name in ("a", "b"):
        rows = {"text": [f"some text {number}" for number in range(200)]}
        parquet.write_table(pa.table(rows), tmp_path / f"{name}.parquet")
    raw = bytearray((tmp_path / "b.parquet").read_bytes())
    footer = len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")
    for place in (footer + 20, footer + 19, footer + 21):  # where it was seen to abort
        for bit in range(8):
            raw[place] ^= 1 << bit
            (tmp_path / "b.parquet").write_bytes(raw)
            if aborts(tmp_path / "b.parquet"):
                return tmp_path
            raw[place] ^= 1 << bit
    pytest.skip("this version of Arrow survives these flips")


def aborts(path):
    command = [sys.executable, "-c", footers.READ]
    run = subprocess.run(command, input=bytes(path), capture_output=True)
    return run.returncode == -signal.SIGABRT


def test_a_footer_that_ends_processes_is_named(damaged, tmp_path, monkeypatch):
    (tmp_path / "pyarrow.py").write_text("raise SystemExit(0)")  # a script of the user's own
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"b\.parquet cannot be read as \.parquet \(its footer"):
        open_source(str(damaged))


def test_a_remote_footer_that_ends_processes_is_named(damaged):
    import fsspec

    storage = fsspec.filesystem("memory")
    for path in damaged.iterdir():
        storage.pipe_file(f"/footers/{path.name}", path.read_bytes())
    with pytest.raises(ValueError, match=r"memory://.*/b\.parquet cannot be read as \.parquet"):
        open_source("memory://footers")
    storage.rm_file("/footers/b.parquet")
    assert len(open_source("memory://footers").files) == 1


def write(path, *, compression="none", version="1.0", encoding="PLAIN", checksums=False):
    """Write a hundred short texts in several pages and two row groups, some of them null."""
    texts = [None if n % 7 == 3 else f"sun {n % 9} moon {n * n}" for n in range(100)]
    by_encoding = {"use_dictionary": True}
    if encoding != "DICTIONARY":
        by_encoding = {"use_dictionary": False, "column_encoding": {"text": encoding}}
    parquet.write_table(
        pa.table({"text": texts}),
        path,
        compression=compression,
        data_page_version=version,
        row_group_size=50,
        data_page_size=300,
        write_statistics=False,  # which repeat some of the texts
        write_page_checksum=checksums,
        **by_encoding,
    )
    return [text or "" for text in texts]


def read(path):
    """Return the texts of a file, an error for those that are no UTF-8."""
    (piece,) = cut_parquet(path, 2**30, "text")
    return [getattr(row, "text", row) for row in read_rows(piece, "text")]


def pages_of(raw):
    """Return the bytes before the footer, without the magic, and the footer."""
    end = len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")
    return raw[4:end], raw[end:]


@tries(share=4)
@given(data=st.data())
def test_damaged_pages_neither_end_the_process_nor_take_long(data, tmp_path):
    path = tmp_path / "a.parquet"
    options = {
        "compression": ["none", "snappy", "zstd", "gzip", "lz4", "brotli"],
        "version": ["1.0", "2.0"],
        "encoding": ["PLAIN", "DICTIONARY", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"],
    }
    drawn = {name: data.draw(st.sampled_from(values)) for name, values in options.items()}
    assert write(path, **drawn) == read(path)
    pages, footer = pages_of(path.read_bytes())
    path.write_bytes(b"PAR1" + data.draw(damaged_bytes(pages)) + footer)
    reads(lambda: read(path))


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("checksums", [True, False])
def test_a_damaged_text_is_refused_where_pages_have_checksums(tmp_path, version, checksums):
    path = tmp_path / "a.parquet"
    texts = write(path, version=version, checksums=checksums)
    raw, refused, other = path.read_bytes(), 0, 0
    places = [match.start() for match in re.finditer(b"moon", pages_of(raw)[0])]
    for place in places:
        flipped = bytearray(raw)
        flipped[4 + place] ^= 1
        path.write_bytes(flipped)
        try:
            other += read(path) != texts
        except ValueError as error:
            refused += "a.parquet cannot be read" in str(error)
    assert len(places) == 86
    assert (refused, other) == ((86, 0) if checksums else (0, 86))


def test_whole_footers_are_read_once(tmp_path, monkeypatch):
    parquet.write_table(pa.table({"text": ["some text"]}), tmp_path / "a.parquet")
    open_source(str(tmp_path))
    monkeypatch.setattr(footers.subprocess, "run", lambda *_, **__: pytest.fail("read again"))
    open_source(str(tmp_path))
