"""Windows: equal to plain slices of the ids, and blind across documents when asked to be."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain_lib.data.foreign import open_foreign
from pretrain_lib.data.packing import read_window, validation_windows
from pretrain_lib.data.shards import TokenArray, TokenFile, write_shard
from pretrain_lib.loss import IGNORED_TARGET


def write_documents(folder, shards):
    """Write lists of documents as shards and return them as one array."""
    files = []
    for index, lengths in enumerate(shards):
        ids = np.arange(sum(lengths)) + 1000 * index
        documents = np.split(ids, np.cumsum(lengths)[:-1])
        dtype = np.dtype("<u2")
        write_shard(folder, f"s{index}", documents, dtype=dtype, text_bytes=0)
        files.append(TokenFile(folder / f"s{index}.bin", len(ids), dtype, is_shard=True))
    return TokenArray(files)


@settings(deadline=None, max_examples=50)
@given(
    shards=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=10), min_size=1, max_size=3),
    data=st.data(),
)
def test_windows_equal_plain_slices_and_mask_the_targets_that_begin_documents(
    tmp_path_factory, shards, data
):
    tokens = write_documents(tmp_path_factory.mktemp("shards"), [[2], *shards])
    ids, begins = [], []
    for index, lengths in enumerate([[2], *shards]):
        for length in lengths:
            begins += [True] + [False] * (length - 1)
        ids += list(range(1000 * index, 1000 * index + sum(lengths)))
    length = data.draw(st.integers(1, len(ids) - 1))
    start = data.draw(st.integers(0, len(ids) - length - 1))

    plain = read_window(tokens, start, length)
    assert set(plain) == {"input_ids", "targets"}
    assert plain["input_ids"].tolist() == ids[start : start + length]
    assert plain["targets"].tolist() == ids[start + 1 : start + length + 1]

    masked = read_window(tokens, start, length, document_masking=True)
    assert masked["input_ids"].tolist() == plain["input_ids"].tolist()
    assert masked["targets"].tolist() == [
        IGNORED_TARGET if begins[i] else ids[i] for i in range(start + 1, start + length + 1)
    ]
    ends = [i for i in range(1, length) if begins[start + i]]
    assert masked["document_ends"].tolist() == ends + [length] * (length - len(ends))
    assert [masked[name].dtype for name in ("input_ids", "targets", "document_ends")] == [
        np.int64,
        np.int64,
        np.int32,
    ]


def test_foreign_arrays_give_the_windows_of_their_ids(tmp_path):
    ids = np.arange(100, dtype=np.uint16)
    ids.tofile(tmp_path / "ids.bin")
    window = read_window(open_foreign(tmp_path / "ids.bin", vocabulary_size=100), 30, 20)
    assert window["input_ids"].tolist() == ids[30:50].tolist()
    assert window["targets"].tolist() == ids[31:51].tolist()


def test_validation_reads_whole_windows_within_the_set_and_the_limit(tmp_path):
    tokens = write_documents(tmp_path, [[101]])
    for length, limit, windows in ((10, 10**9, 10), (10, 35, 3), (100, 100, 1), (50, 99, 1)):
        assert validation_windows(tokens, length, max_tokens=limit) == windows
        assert len(read_window(tokens, (windows - 1) * length, length)["targets"]) == length


@pytest.mark.parametrize(("length", "limit"), [(101, 10**9), (50, 49)])
def test_validation_set_shorter_than_a_window_is_refused(tmp_path, length, limit):
    tokens = write_documents(tmp_path, [[101]])
    with pytest.raises(ValueError, match=f"{length + 1} tokens: the set has 101, .*={limit}"):
        validation_windows(tokens, length, max_tokens=limit)
