"""Tokens on disk: what is read equals what was written, and what was damaged is refused."""

import hashlib
import json
import subprocess
import sys
import time
from array import array
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain_lib.data.tokens.arrays import open_split
from pretrain_lib.data.tokens.manifests import FORMAT_VERSION
from pretrain_lib.data.tokens.shards import (
    BLOCK_BYTES,
    SHARD_HASHES,
    read_manifest,
    token_dtype,
    write_shard,
)
from pretrain_lib.data.tokens.verify import verify_folder
from pretrain_lib.files.writes import STAGING, write_json
from tests.shards import write_documents

documents = st.lists(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=9), max_size=6)


def write_folder(folder, shards, dtype="<u2", last_ends=()):
    """Write a prepared folder by hand: one shard for each list of documents.

    `last_ends` is whether the last document of each shard ends in it, if it need not.
    """
    folder.mkdir(exist_ok=True)
    records = []
    for index, docs in enumerate(shards):
        name = f"train-{index:05d}"
        arrays = [np.array(document, dtype=np.int64) for document in docs]
        ends = {"last_ends": last_ends[index]} if last_ends else {}
        record = write_documents(folder, name, arrays, dtype=dtype, **ends)
        assert record == json.loads((folder / f"{name}.json").read_text())
        json_hash = hashlib.sha256((folder / f"{name}.json").read_bytes())
        records.append(record | {"name": name, "json_sha256": json_hash.hexdigest()})
    write_json(folder / "manifest.json", manifest_of(records, dtype))
    return folder


def manifest_of(records, dtype):
    """Return a manifest of an earlier version, without a hash of its own."""
    totals = {key: sum(record[key] for record in records) for key in ("tokens", "documents")}
    splits = {"train": totals | {"shards": records, "lowest_id": 0, "highest_id": 2**16 - 1}}
    return {
        "format_version": FORMAT_VERSION,
        "sources": ["by hand"],
        "validation": "none",
        "dtype": dtype,
        "tokenizer_sha256": "",
        "tokenizer_files": {},
        "vocabulary_size": 2**16,
        "splits": splits | {"validation": {"tokens": 0, "documents": 0, "shards": []}},
        "fingerprint": "",
    }


def flip(path, position):
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@settings(deadline=None, max_examples=25)
@given(shards=st.lists(documents, min_size=1, max_size=4), data=st.data())
def test_reads_and_document_ends_equal_plain_lists(tmp_path_factory, dtype, shards, data):
    if dtype == "<u4":
        shards = [[[i * 65_537 for i in document] for document in docs] for docs in shards]
    tokens = [i for docs in shards for document in docs for i in document]
    last_ends = [data.draw(st.booleans()) for _ in shards]
    ends, total = set(), 0
    for docs, last_one_ends in zip(shards, last_ends, strict=True):
        for document in docs:
            total += len(document)
            if document is not docs[-1] or last_one_ends:
                ends.add(total)
    folder = write_folder(tmp_path_factory.mktemp("shards"), shards, dtype, last_ends)
    split = open_split(folder, "train")
    assert len(split) == len(tokens)
    for _ in range(5 if tokens else 0):
        start = data.draw(st.integers(0, len(tokens) - 1))
        count = data.draw(st.integers(1, len(tokens) - start))
        read = split.read(start, count)
        assert read.dtype == np.int64
        assert read.tolist() == tokens[start : start + count]
        inside = split.document_ends(start, count)
        assert inside.dtype == np.int64
        assert inside.tolist() == [i for i in range(1, count) if start + i in ends]


def test_reading_no_tokens_gives_an_empty_array(tmp_path):
    split = open_split(write_folder(tmp_path / "data", [[[1, 2, 3]]]), "train")
    assert split.read(1, 0).tolist() == []


def test_files_on_disk_are_what_other_readers_expect(tmp_path):
    write_folder(tmp_path, [[[1, 2, 3], [65_535]]])
    assert (tmp_path / "train-00000.bin").read_bytes() == array("H", [1, 2, 3, 65_535]).tobytes()
    ends = np.load(tmp_path / "train-00000.ends.npy", allow_pickle=False)
    assert ends.dtype == np.uint64
    assert ends.tolist() == [3, 4]
    assert not list(tmp_path.glob(f"*.{STAGING}"))


def test_a_file_that_is_being_replaced_is_whole_at_any_instant(tmp_path):
    script = (
        "import itertools, sys; from pathlib import Path;"
        "from pretrain_lib.files.writes import write_atomically;"
        "[write_atomically(Path(sys.argv[1]), b'%d' % (i % 10) * 2**22) for i in itertools.count()]"
    )
    path = tmp_path / "file"
    writer = subprocess.Popen([sys.executable, "-c", script, str(path)])
    try:
        while not path.is_file():
            assert writer.poll() is None
            time.sleep(0.01)
        found = {path.read_bytes() for _ in range(100)}
    finally:
        writer.kill()
        writer.wait()
    assert len(found) > 1
    assert all(len(content) == 2**22 and len(set(content)) == 1 for content in found)


def test_dtype_is_the_narrowest_that_holds_the_vocabulary():
    assert [token_dtype(size).str for size in (256, 65_536, 65_537)] == ["<u2", "<u2", "<u4"]


def test_a_document_may_go_on_in_the_next_shard(tmp_path):
    folder = write_folder(tmp_path, [[[1, 2], [3]], [[4], [5]]], last_ends=[False, True])
    assert np.load(folder / "train-00000.ends.npy").tolist() == [2]
    assert json.loads((folder / "train-00000.json").read_text())["documents"] == 1
    assert open_split(folder, "train").document_ends(0, 5).tolist() == [2, 4]


def test_verify_names_every_kind_of_damaged_file(tmp_path):
    write_folder(tmp_path, [[[1, 2, 3]], [[4, 5], [6]]])
    assert verify_folder(tmp_path) == []
    for suffix in SHARD_HASHES:
        path = tmp_path / f"train-00001{suffix}"
        for position in range(path.stat().st_size):
            flip(path, position)
            (problem,) = verify_folder(tmp_path)
            assert str(path) in problem
            flip(path, position)
    assert verify_folder(tmp_path) == []


@pytest.mark.parametrize("suffix", SHARD_HASHES)
def test_verify_names_a_missing_file(tmp_path, suffix):
    path = write_folder(tmp_path, [[[1, 2, 3]]]) / f"train-00000{suffix}"
    path.unlink()
    assert verify_folder(tmp_path) == [f"{path}: missing"]


def large_split(folder):
    """Three blocks and a bit, as one document."""
    per_block = BLOCK_BYTES // 2
    ids = np.arange(3 * per_block + 100) % 50_000
    return write_folder(folder, [[ids]]), ids, per_block


@pytest.mark.parametrize("block", [0, 1, 2, 3])
def test_flipped_byte_raises_where_its_block_is_read_and_nowhere_else(tmp_path, block):
    folder, ids, per_block = large_split(tmp_path)
    flip(folder / "train-00000.bin", block * BLOCK_BYTES + 20)
    for other in range(4):
        start = other * per_block
        for count in (1, 50):
            split = open_split(folder, "train")
            if other == block:
                with pytest.raises(ValueError, match=f"block {block} .*differ from what was"):
                    split.read(start, count)
            else:
                assert split.read(start, count).tolist() == ids[start : start + count].tolist()
    split = open_split(folder, "train")
    with pytest.raises(ValueError, match="differ from what was"):
        split.read(0, len(ids))


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_reads_of_whole_blocks_are_checked_too(tmp_path, blocks):
    folder, _, per_block = large_split(tmp_path)
    flip(folder / "train-00000.bin", (blocks - 1) * BLOCK_BYTES + 20)
    with pytest.raises(ValueError, match="differ from what was"):
        open_split(folder, "train").read(0, blocks * per_block)


@pytest.mark.parametrize("size", [0, 7])
def test_truncated_shard_is_refused_at_open(tmp_path, size):
    path = write_folder(tmp_path, [[[1, 2, 3, 4]]]) / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=f"train-00000.bin: {size} bytes, expected 8"):
        open_split(tmp_path, "train")


def test_missing_shard_is_refused_at_open(tmp_path):
    (write_folder(tmp_path, [[[1]]]) / "train-00000.bin").unlink()
    with pytest.raises(ValueError, match="missing"):
        open_split(tmp_path, "train")


def test_folder_without_manifest_or_of_another_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no manifest.json"):
        open_split(tmp_path, "train")
    write_json(tmp_path / "manifest.json", {"format_version": 99})
    with pytest.raises(ValueError, match="format_version=99"):
        read_manifest(tmp_path)


def test_the_format_on_disk_is_frozen(tmp_path):
    tokens = np.array([0, 5, 6, 0, 40_000], dtype=token_dtype(50_257))
    write_shard(tmp_path, "x", tokens, np.array([3, 5]), text_bytes=9)
    assert (tmp_path / "x.bin").read_bytes().hex() == "0000050006000000409c"
    assert np.load(tmp_path / "x.ends.npy").dtype == np.dtype("<u8")
    hashes = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.iterdir()
    }
    assert hashes == {
        "x.bin": "fe89bf238156d393669d9e97a1edbde1fb61e36889b2bb7c63c01b46bb92b02a",
        "x.ends.npy": "93cf2543ea39f6d6412e1d61311ddd85f68db8aad93d2455d7e5fc7ff99201cb",
        "x.json": "eac7b579c6e9afa60bd26b7b80222b94b7c37c9cdee3a029151150656b5b23f9",
    }


@pytest.mark.parametrize(
    ("files", "path", "remedy"),
    [
        (
            ["train.bin", "val.bin"],
            "",
            r"folder of token arrays; .*, such as \S+/folder/train\*.bin,",
        ),
        (["part.npy"], "", r"folder of token arrays; .*, such as \S+/folder/train\*.npy,"),
        (["ids.pt"], "ids.pt", r"neither one of text nor a token array .*numpy.save"),
        (
            ["a.jsonl"],
            "a.jsonl",
            "a file of text; run `pretrain prepare` on it and give the folder",
        ),
        (["a.txt.gz"], "a.txt.gz", "a file of text; run `pretrain prepare`"),
        (
            ["state.json", "dataset_info.json"],
            "",
            r"save_to_disk; .*load_from_disk\(FOLDER\).to_parq",
        ),
        (["dataset_dict.json"], "", r"save_to_disk; .* of each split"),
        (["job.json", "train-00000-000.bin"], "", "did not finish it; run the same command again"),
        (
            ["a.txt"],
            "",
            "not a prepared folder; if it is one of text, run `pretrain prepare` on it",
        ),
        (["manifest.json"], "manifest.json", r"it is a manifest; give its folder, \S+/folder$"),
    ],
)
def test_what_is_not_prepared_is_said_by_kind_with_its_remedy(tmp_path, files, path, remedy):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in files:
        (folder / name).write_bytes(b"{}")
    with pytest.raises(ValueError, match=f"holds no manifest.json: .*{remedy}"):
        read_manifest(folder / path)


@pytest.mark.skipif(not find_spec("datasets"), reason="needs datasets")
@pytest.mark.parametrize("splits", [False, True])
def test_a_folder_of_save_to_disk_is_known_as_datasets_writes_it(tmp_path, splits):
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["one", "two"]})
    made = datasets.DatasetDict({"train": rows}) if splits else rows
    made.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="save_to_disk"):
        read_manifest(tmp_path / "saved")
