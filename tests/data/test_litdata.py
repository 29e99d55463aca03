"""Chunks of litdata, written by the layout of its binary writer: ids, types, refusals."""

import json
import struct

import numpy as np
import pytest

from pretrain_lib.data.inspection import inspect_data
from pretrain_lib.data.tokens.foreign import open_foreign

FORMATS = {"no_header_tensor:16": "i", "no_header_tensor:18": "q", "no_header_tensor:20": "H"} | {
    "no_header_numpy:5": "H",
    "no_header_numpy:6": "I",
}


def write_chunks(folder, chunks, data_format="no_header_tensor:16", **config):
    """Write chunks, each a list of items of ids, as litdata.optimize does for a TokensLoader."""
    records = []
    for number, items in enumerate(chunks):
        header_bytes = 4 * (len(items) + 2)
        blobs = [struct.pack(f"<{len(i)}{FORMATS[data_format]}", *i) for i in items]
        places = [header_bytes, *(header_bytes + np.cumsum([len(b) for b in blobs])).tolist()]
        raw = struct.pack(f"<{len(places) + 1}I", len(items), *places) + b"".join(blobs)
        name, dim = f"chunk-{number}-0.bin", sum(map(len, items))
        (folder / name).write_bytes(raw)
        records.append(
            {"chunk_bytes": len(raw), "chunk_size": len(items), "dim": dim, "filename": name}
        )
    config = {"compression": None, "encryption": None, "data_format": [data_format]} | config
    config = {"item_loader": "TokensLoader"} | config
    (folder / "index.json").write_text(json.dumps({"chunks": records, "config": config}))


def make_chunks():
    rng = np.random.default_rng(0)
    return [
        [rng.integers(0, 30_000, size).tolist() for size in sizes]
        for sizes in ([5, 1, 9], [70], [2, 2])
    ]


@pytest.mark.parametrize("data_format", list(FORMATS))
@pytest.mark.parametrize("name", ["index.json", "chunk-*.bin"])
def test_the_ids_of_all_chunks_are_one_array(tmp_path, data_format, name):
    chunks = make_chunks()
    write_chunks(tmp_path, chunks, data_format)
    tokens = open_foreign(tmp_path / name, vocabulary_size=30_000)
    ids = [i for items in chunks for item in items for i in item]
    assert tokens.read(0, len(tokens)).tolist() == ids
    assert tokens.files[0].dtype == np.dtype(f"<{FORMATS[data_format]}")
    assert not tokens.has_documents
    one = open_foreign(tmp_path / "chunk-1-0.bin", vocabulary_size=30_000)
    assert one.read(0, len(one)).tolist() == chunks[1][0]


def test_more_than_ten_chunks_are_read_in_the_order_of_the_index(tmp_path):
    write_chunks(tmp_path, [[[number]] for number in range(12)])
    tokens = open_foreign(tmp_path / "index.json", vocabulary_size=12)
    assert tokens.read(0, 12).tolist() == list(range(12))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"compression": "zstd"}, r"index.json: chunks with compression \(zstd\)"),
        ({"encryption": {"algorithm": "fernet"}}, "index.json: chunks with encryption"),
        ({"data_format": ["no_header_tensor:0"]}, "is not an array of ids"),
        ({"data_format": ["tensor:16"]}, "is not an array of ids"),
        ({"data_format": ["int", "no_header_tensor:16"]}, "is not an array of ids"),
        ({"item_loader": "PyTreeLoader"}, "for PyTreeLoader is not an array of ids"),
    ],
)
def test_other_data_are_refused_by_name(tmp_path, config, message):
    write_chunks(tmp_path, make_chunks())
    index = json.loads((tmp_path / "index.json").read_text())
    index["config"] |= config
    (tmp_path / "index.json").write_text(json.dumps(index))
    for name in ("index.json", "chunk-0-0.bin"):
        with pytest.raises(ValueError, match=message):
            open_foreign(tmp_path / name, vocabulary_size=None)


def test_chunks_that_differ_from_the_index_are_refused(tmp_path):
    write_chunks(tmp_path, make_chunks())
    path = tmp_path / "chunk-1-0.bin"
    raw = path.read_bytes()
    for wrong in (raw[:-4], raw + bytes(4), b""):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match="chunk-1-0.bin: .* bytes, but 70 int32 ids in 1 item"):
            open_foreign(tmp_path / "index.json", vocabulary_size=None)
    path.write_bytes(struct.pack("<I", 2) + raw[4:])
    with pytest.raises(ValueError, match="chunk-1-0.bin: its header does not list 1 items"):
        open_foreign(tmp_path / "index.json", vocabulary_size=None)
    path.rename(tmp_path / "chunk-9-0.bin")
    with pytest.raises(ValueError, match="chunk-9-0.bin: .*index.json does not list it"):
        open_foreign(tmp_path / "*.bin", vocabulary_size=None)
    with pytest.raises(ValueError, match="chunk-1-0.bin: missing"):
        open_foreign(tmp_path / "index.json", vocabulary_size=None)


def test_a_folder_of_litdata_is_told_to_give_its_index(tmp_path):
    write_chunks(tmp_path, make_chunks())
    with pytest.raises(
        ValueError, match="is a folder of litdata: give its index, data.path=.*json"
    ):
        list(inspect_data([tmp_path], sequence_length=8, window=0))


def test_another_index_json_decides_nothing(tmp_path):
    (tmp_path / "index.json").write_text('{"shards": []}')
    np.arange(100, dtype="<u2").tofile(tmp_path / "train.bin")
    assert len(open_foreign(tmp_path / "train.bin", vocabulary_size=100)) == 100
    with pytest.raises(ValueError, match="index.json is not an index of litdata"):
        open_foreign(tmp_path / "index.json", vocabulary_size=100)


@pytest.mark.parametrize("damage", ["cut", "mark", "fields", "gone"])
def test_a_chunk_is_not_read_as_bare_ids_where_its_index_cannot_be_read(tmp_path, damage):
    write_chunks(tmp_path, make_chunks(), "no_header_tensor:20")
    index = tmp_path / "index.json"
    raw = index.read_bytes()
    damaged = {"cut": raw[:-5], "mark": b"\xef\xbb\xbf" + raw}
    damaged["fields"] = raw.replace(b'"filename"', b'"file"')
    index.write_bytes(damaged.get(damage, raw))
    if damage == "gone":
        index.unlink()
    named = "which is read by the index.json beside it" if damage == "gone" else "cannot be read"
    for dtype in (None, "uint16"):
        with pytest.raises(ValueError, match=named):
            open_foreign(tmp_path / "chunk-*.bin", vocabulary_size=None, dtype=dtype)
