"""Token files of other projects, and text, damaged at random (`inputs`)."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain_lib.data.tokens.foreign import open_foreign
from pretrain_lib.data.tokens.megatron import HEADER, MAGIC
from tests.faults.inputs import by_value_or_byte, damaged, reads, tries

pytestmark = [pytest.mark.moderate, pytest.mark.filterwarnings("ignore")]


@tries()
@given(data=st.data())
def test_token_arrays(data, tmp_path):
    ids = np.arange(100, dtype="<u2")
    header = np.zeros(256, dtype="<i4")
    header[:3] = (20240520, 1, 100)
    contents = {
        "a.npy": None,
        "b.bin": ids.tobytes(),
        "c.bin": header.tobytes() + ids.tobytes(),
        "d.ds": ids.tobytes(),
    }
    np.save(tmp_path / "a.npy", ids)
    contents["a.npy"] = (tmp_path / "a.npy").read_bytes()
    name = data.draw(st.sampled_from(sorted(contents)))
    (tmp_path / name).write_bytes(data.draw(damaged(contents[name])))
    if name == "d.ds":
        index = np.arange(10, 101, 10, dtype="<u8").tobytes()
        (tmp_path / "d.ds.index").write_bytes(data.draw(damaged(index)))

    def read():
        tokens = open_foreign(tmp_path / name, vocabulary_size=50_000)
        tokens.read(0, len(tokens))
        if tokens.has_documents:
            list(tokens.iterate_ends())

    reads(read)


def read_all(path):
    tokens = open_foreign(path, vocabulary_size=50_000)
    tokens.read(0, len(tokens))
    if tokens.has_documents:
        list(tokens.iterate_ends())


@tries()
@given(data=st.data())
def test_indices_of_megatron(data, tmp_path):
    lengths = np.array([30, 0, 50, 20], "<i4")
    starts = 2 * np.array([0, 30, 30, 80], "<i8")
    header = HEADER.pack(MAGIC, 1, 8, 4, 4)
    index = header + lengths.tobytes() + starts.tobytes() + np.array([0, 1, 3, 4], "<i8").tobytes()
    (tmp_path / "a.bin").write_bytes(np.arange(100, dtype="<u2").tobytes())
    (tmp_path / "a.idx").write_bytes(index)
    read_all(tmp_path / "a.bin")  # it is whole
    (tmp_path / "a.idx").write_bytes(data.draw(damaged(index)))
    reads(lambda: read_all(tmp_path / "a.bin"))


@tries()
@given(data=st.data())
def test_chunks_of_litdata(data, tmp_path):
    record = {"chunk_bytes": 216, "chunk_size": 2, "dim": 100, "filename": "chunk-0-0.bin"}
    config = {"compression": None, "data_format": ["no_header_numpy:5"], "encryption": None}
    index = json.dumps({"chunks": [record], "config": config}).encode()
    places = np.array([2, 16, 76, 216], "<u4").tobytes()
    chunk = places + np.arange(100, dtype="<u2").tobytes()
    contents = {"index.json": index, "chunk-0-0.bin": chunk}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    read_all(tmp_path / "index.json")  # it is whole
    name = data.draw(st.sampled_from(sorted(contents)))
    other = by_value_or_byte if name == "index.json" else damaged
    (tmp_path / name).write_bytes(data.draw(other(contents[name])))
    reads(lambda: read_all(tmp_path / "index.json"))
