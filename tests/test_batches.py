"""Batches: item k is window k, and a step holds the same micro-batches on any number of ranks."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pretrain_lib.data.arrays import TokenArray, TokenFile
from pretrain_lib.data.batches import PackedDataset, iterate_steps, rank_micro_batches
from pretrain_lib.data.foreign import open_foreign
from pretrain_lib.data.shards import write_shard
from pretrain_lib.loss import IGNORED_TARGET

LENGTH = 16
CPU = torch.device("cpu")


def write_source(folder, name, num_tokens, first_id):
    ids = np.arange(num_tokens) + first_id
    documents = np.split(ids, range(7, num_tokens, 7))
    write_shard(folder, name, documents, dtype=np.dtype("<u2"), text_bytes=0)
    return TokenArray(
        [TokenFile(folder / f"{name}.bin", num_tokens, np.dtype("<u2"), is_shard=True)]
    )


@pytest.fixture
def sources(tmp_path):
    return [write_source(tmp_path, "a", 2000, 0), write_source(tmp_path, "b", 900, 10_000)]


@pytest.fixture(params=[False, True], ids=["plain", "document_masking"])
def dataset(sources, request):
    return PackedDataset(
        sources,
        sequence_length=LENGTH,
        seed=3,
        weights=(1, 2),
        document_masking=request.param,
    )


def assert_equal(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            assert torch.equal(batch[name], other[name])


def stack(items):
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def test_items_are_the_located_windows(dataset):
    located = dataset.order.locate(np.arange(3 * len(dataset)))
    for k, (source, _, start) in enumerate(zip(*located, strict=True)):
        first = int(start) + (0, 10_000)[source]
        item = dataset[k]
        assert item["input_ids"].tolist() == list(range(first, first + LENGTH))
        targets = range(first + 1, first + LENGTH + 1)
        begins = {t for t in targets if dataset.document_masking and (t % 10_000) % 7 == 0}
        assert item["targets"].tolist() == [IGNORED_TARGET if t in begins else t for t in targets]


def test_length_is_one_epoch_that_reads_every_window_once(sources):
    dataset = PackedDataset(sources[0], sequence_length=LENGTH)
    firsts = [int(dataset[k]["input_ids"][0]) for k in range(len(dataset))]
    assert len(dataset) == 124
    assert sorted(firsts) == list(range(min(firsts), min(firsts) + 124 * LENGTH, LENGTH))
    assert firsts != sorted(firsts)


@pytest.mark.parametrize("workers", [0, 2])
def test_plain_dataloader_gives_the_windows_in_order(dataset, workers):
    loader = DataLoader(dataset, batch_size=10, num_workers=workers)
    expected = [
        stack([dataset[k] for k in range(first, min(first + 10, len(dataset)))])
        for first in range(0, len(dataset), 10)
    ]
    assert_equal(list(loader), expected)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_micro_batches_are_the_same_tensors_on_any_number_of_ranks(dataset, world_size):
    first, count, size = 37, 48, 3
    expected = [
        stack([dataset[first + m * size + i] for i in range(size)]) for m in range(count // size)
    ]
    for rank in range(world_size):
        batches = rank_micro_batches(
            dataset, first, count, micro_batch=size, rank=rank, world_size=world_size
        )
        assert_equal(batches, expected[rank::world_size])


@pytest.mark.parametrize("world_size", [1, 2])
def test_iterate_steps_yields_the_micro_batches_of_steps_of_any_size(dataset, world_size):
    steps = [(0, 4), (4, 8), (12, 4), (500, 12)]
    for rank in range(world_size):
        split = {"micro_batch": 2, "rank": rank, "world_size": world_size}
        seen = list(iterate_steps(dataset, iter(steps), device=CPU, **split))
        assert len(seen) == len(steps)
        for batches, step in zip(seen, steps, strict=True):
            assert_equal(batches, rank_micro_batches(dataset, *step, **split))
    assert list(iterate_steps(dataset, [], micro_batch=2, device=CPU)) == []


def test_damaged_data_stop_the_iteration_at_their_step(tmp_path):
    source = write_source(tmp_path, "a", 40_000, 0)
    dataset = PackedDataset(source, sequence_length=LENGTH)
    path = tmp_path / "a.bin"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    starts = dataset.order.locate(np.arange(500))[2]
    damaged = (starts + LENGTH >= 32_768).tolist().index(True)  # the second block of 64 KiB
    assert damaged > 0
    steps = iterate_steps(dataset, ((k, 1) for k in range(500)), micro_batch=1, device=CPU)
    for _ in range(damaged):
        next(steps)
    with pytest.raises(ValueError, match="differ from what was written"):
        next(steps)


def test_document_masking_is_refused_where_documents_are_unknown(tmp_path, sources):
    np.save(tmp_path / "ids.npy", np.arange(1000))
    foreign = open_foreign(tmp_path / "ids.npy", vocabulary_size=1000)
    assert len(PackedDataset(foreign, sequence_length=LENGTH)[0]["input_ids"]) == LENGTH
    with pytest.raises(ValueError, match="data.document_masking=true needs.*pretrain prepare"):
        PackedDataset([*sources, foreign], sequence_length=LENGTH, document_masking=True)


def test_data_shorter_than_a_window_are_refused(sources):
    with pytest.raises(ValueError, match="source of 900 tokens is too short.*at most 899"):
        PackedDataset(sources, sequence_length=900)


def test_windows_that_do_not_divide_into_micro_batches_are_refused(dataset):
    with pytest.raises(AssertionError, match="10 windows do not divide"):
        rank_micro_batches(dataset, 0, 10, micro_batch=2, world_size=2)
