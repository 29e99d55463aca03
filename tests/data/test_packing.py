"""Windows: equal to plain slices of the ids, and blind across documents when asked to be."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain_lib.data.tokens.arrays import TokenArray, TokenFile
from pretrain_lib.data.tokens.foreign import open_foreign
from pretrain_lib.data.windows.batches import PackedDataset
from pretrain_lib.data.windows.best_fit import open_plan
from pretrain_lib.data.windows.packing import (
    IGNORED_TARGET,
    Windows,
    fill_planned_window,
    fill_window,
    validation_windows,
)
from tests.shards import write_documents


def write_shards(folder, shards):
    """Write lists of documents as shards and return them as one array."""
    files = []
    for index, lengths in enumerate(shards):
        ids = np.arange(sum(lengths)) + 1000 * index
        documents = np.split(ids, np.cumsum(lengths)[:-1])
        dtype = np.dtype("<u2")
        write_documents(folder, f"s{index}", documents)
        files.append(TokenFile(folder / f"s{index}.bin", len(ids), dtype, is_shard=True))
    return TokenArray(files)


def read_window(tokens, start, length, *, document_masking=False):
    windows = Windows.empty(1, length, document_masking=document_masking)
    fill_window(windows, 0, tokens, start)
    return {name: rows[0] for name, rows in windows.as_dict().items()}


@settings(deadline=None, max_examples=50)
@given(
    shards=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=10), min_size=1, max_size=3),
    data=st.data(),
)
def test_windows_equal_plain_slices_and_mask_the_targets_that_begin_documents(
    tmp_path_factory, shards, data
):
    tokens = write_shards(tmp_path_factory.mktemp("shards"), [[2], *shards])
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
    tokens = write_shards(tmp_path, [[101]])
    for length, limit, windows in ((10, 10**9, 10), (10, 35, 3), (100, 100, 1), (50, 99, 1)):
        assert validation_windows(tokens, length, max_tokens=limit) == windows
        assert len(read_window(tokens, (windows - 1) * length, length)["targets"]) == length


def test_validation_set_shorter_than_a_window_is_refused(tmp_path):
    tokens = write_shards(tmp_path, [[101]])
    with pytest.raises(ValueError, match="102 tokens: the set has 101; hold out more"):
        validation_windows(tokens, 101, max_tokens=10**9)


def plan_of(tokens, folder, length):
    return open_plan(
        tokens.iterate_ends, len(tokens), folder, fingerprint="f" * 64, sequence_length=length
    )


@settings(deadline=None, max_examples=40)
@given(
    shards=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=10), min_size=1, max_size=3),
    length=st.integers(1, 16),
    document_masking=st.booleans(),
)
def test_planned_windows_hold_every_token_once_with_the_token_that_follows_it(
    tmp_path_factory, shards, length, document_masking
):
    folder = tmp_path_factory.mktemp("planned")
    tokens = write_shards(folder, shards)
    ids = [1000 * index + i for index, lengths in enumerate(shards) for i in range(sum(lengths))]
    lasts = set(np.cumsum([n for lengths in shards for n in lengths]) - 1)
    follows = dict(zip(ids, ids[1:] + [IGNORED_TARGET], strict=True))
    if document_masking:
        follows |= {ids[last]: IGNORED_TARGET for last in lasts}
    plan, seen = plan_of(tokens, folder, length), []
    for window in range(plan.num_windows):
        rows = Windows.empty(1, length, document_masking=document_masking)
        fill_planned_window(rows, 0, tokens, plan, window)
        inputs, targets = rows.input_ids[0].tolist(), rows.targets[0].tolist()
        used = int(plan.pieces(window)["length"].sum())
        assert targets[:used] == [follows[i] for i in inputs[:used]]
        assert inputs[used:] == [0] * (length - used)
        assert targets[used:] == [IGNORED_TARGET] * (length - used)
        if document_masking:
            ends = rows.document_ends[0]
            bounds = [0, *sorted({int(e) for e in ends if e <= used})]
            pieces = [inputs[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
            assert all(piece == list(range(piece[0], piece[-1] + 1)) for piece in pieces)
            assert [len(piece) for piece in pieces] == plan.pieces(window)["length"].tolist()
        seen += inputs[:used]
    assert sorted(seen) == sorted(ids)


def test_planned_epochs_are_permutations_of_the_plan_in_exact_shares(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    sources = [
        write_shards(tmp_path / "a", [[9, 4, 3, 12, 7] * 8]),
        write_shards(tmp_path / "b", [[5, 30, 2] * 8]),
    ]
    plans = [plan_of(sources[0], tmp_path / "a", 8), plan_of(sources[1], tmp_path / "b", 8)]
    dataset = PackedDataset(sources, sequence_length=8, weights=(1, 3), plans=plans)
    source, epoch, window = dataset.order.locate(np.arange(2 * 4096))
    for s, plan in enumerate(plans):
        assert np.sum(source[:4096] == s) == (1024, 3072)[s]
        for e in (0, 1):
            drawn = window[(source == s) & (epoch == e)]
            assert sorted(drawn.tolist()) == list(range(plan.num_windows))
    assert len(dataset) == sum(plan.num_windows for plan in plans)
    drawn = np.bincount(source, minlength=2)
    assert dataset.order.planned_epochs(2 * 4096) == [
        n / plan.num_windows for n, plan in zip(drawn.tolist(), plans, strict=True)
    ]
