"""Batches: item k is window k, and a step holds the same micro-batches on any number of ranks."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import DataLoader

from pretrain_lib.data.tokens.arrays import TokenArray, TokenFile
from pretrain_lib.data.tokens.foreign import open_foreign
from pretrain_lib.data.windows.batches import (
    PackedDataset,
    iterate_steps,
    rank_micro_batches,
)
from pretrain_lib.data.windows.best_fit import open_plan
from pretrain_lib.data.windows.document_ends import narrow_document_ends
from pretrain_lib.data.windows.order import BLOCK_WINDOWS
from pretrain_lib.data.windows.packing import IGNORED_TARGET
from pretrain_lib.models.attention import document_index
from pretrain_lib.models.gpt2 import GPT2, GPT2Config
from pretrain_lib.models.llama import Llama, LlamaConfig
from pretrain_lib.optim.schedule import BatchSizes
from tests.shards import write_documents

LENGTH = 16
CPU = torch.device("cpu")


def write_source(folder, name, num_tokens, first_id):
    ids = np.arange(num_tokens) + first_id
    documents = np.split(ids, range(7, num_tokens, 7))
    write_documents(folder, name, documents)
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


def test_iterating_ends_with_the_epoch(dataset):
    items = list(dataset)
    assert_equal(items, [dataset[k] for k in range(len(dataset))])


@pytest.mark.parametrize("options", [{}, {"num_workers": 2}, {"persistent_workers": True}])
def test_a_loader_goes_on_into_the_epoch_that_was_set(dataset, options):
    if "persistent_workers" in options:
        options = options | {"num_workers": 1}
    loader, size = DataLoader(dataset, batch_size=10, **options), len(dataset)
    for epoch in (0, 1, 3):
        dataset.set_epoch(epoch)
        first = epoch * size
        expected = dataset.batch(range(first, first + size))
        seen = list(loader)
        assert sum(len(batch["targets"]) for batch in seen) == size
        assert_equal([{n: torch.cat([b[n] for b in seen]) for n in expected}], [expected])
    with pytest.raises(IndexError, match="windows count from 0"):
        dataset[-1]
    with pytest.raises(ValueError, match="epoch=-1 must be a whole number of at least 0"):
        dataset.set_epoch(-1)


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
            own = rank_micro_batches(dataset, *step, **split)
            assert_equal(batches, [narrow_document_ends(batch) for batch in own])
    assert list(iterate_steps(dataset, [], micro_batch=2, device=CPU)) == []


def test_the_rank_is_that_of_the_process_group_if_none_is_given(dataset, tmp_path):
    steps, options = [(0, 4), (4, 8)], {"micro_batch": 2, "device": CPU}
    expected = [
        list(iterate_steps(dataset, steps, rank=rank, world_size=2, **options)) for rank in range(2)
    ]
    alone = list(iterate_steps(dataset, steps, rank=0, world_size=1, **options))
    assert_equal(next(iterate_steps(dataset, steps, **options)), alone[0])
    for rank in range(2):
        torch.distributed.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
        try:
            found = list(iterate_steps(dataset, steps, **options))
            first = rank_micro_batches(dataset, 0, 4, micro_batch=2)
        finally:
            torch.distributed.destroy_process_group()
        for own, whole in zip(found, expected[rank], strict=True):
            assert_equal(own, whole)
        assert_equal([narrow_document_ends(batch) for batch in first], expected[rank][0])


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"rank": -1, "world_size": 2}, "rank=-1 must be a whole number of at least 0"),
        ({"rank": 2, "world_size": 2}, "rank=2 must be below world_size=2: give both"),
        ({"rank": 1}, "rank=1 must be below world_size=1: give both, or neither"),
        ({"rank": 0, "world_size": 0}, "world_size=0 must be a whole number of at least 1"),
        ({"rank": 0.0, "world_size": 2}, "rank=0.0 must be a whole number"),
    ],
)
def test_a_rank_that_is_none_of_the_world_is_refused(dataset, place, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        rank_micro_batches(dataset, 8, 4, micro_batch=2, **place)
    with pytest.raises(ValueError, match=f"^{message}"):
        next(iterate_steps(dataset, [(8, 4)], micro_batch=2, device=CPU, **place))


@pytest.mark.parametrize("count", [0, -4])
def test_a_step_of_no_windows_is_refused(dataset, count):
    with pytest.raises(ValueError, match=f"a step of {count} windows .* give 4 windows, or a mult"):
        rank_micro_batches(dataset, 8, count, micro_batch=2, rank=0, world_size=2)


def steps_of(sizes, first, last):
    return [(sizes.before(step), sizes.at(step)) for step in range(first, last)]


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_a_ramp_over_several_epochs_is_the_row_of_windows_on_any_number_of_ranks(
    dataset, world_size
):
    sizes, size = BatchSizes(full=48, initial=16, increment=16, ramp_windows=200), 2
    steps = steps_of(sizes, 0, 14)
    assert len({count for _, count in steps}) == 3
    assert sum(steps[-1]) > 2 * len(dataset)
    split = {"micro_batch": size, "world_size": world_size, "device": CPU}
    ranks = [list(iterate_steps(dataset, steps, rank=r, **split)) for r in range(world_size)]
    position = 0
    for step in zip(*ranks, strict=True):
        for micro_batches in zip(*step, strict=True):  # the next one of each rank
            for batch in micro_batches:
                windows = stack([dataset[position + i] for i in range(size)])
                assert_equal([batch], [narrow_document_ends(windows)])
                position += size
    assert position == sum(steps[-1])


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 30), min_size=2, max_size=2), st.integers(0, 1))
def test_steps_resumed_twice_are_those_of_a_run_that_went_through(
    tmp_path_factory, stops, world_exponent
):
    folder = tmp_path_factory.mktemp("sources")
    source, other = write_source(folder, "a", 500, 0), write_source(folder, "b", 300, 10_000)
    dataset = PackedDataset([source, other], sequence_length=LENGTH, document_masking=True)
    sizes = BatchSizes(full=8, initial=4, increment=4, ramp_windows=40)
    split = {"micro_batch": 2, "device": CPU, "world_size": 2**world_exponent}
    whole = list(iterate_steps(dataset, steps_of(sizes, 0, 30), **split))
    assert sizes.before(30) > 4 * len(dataset)
    seen, first = [], 0
    for last in (*sorted(stops), 30):
        again = PackedDataset([source, other], sequence_length=LENGTH, document_masking=True)
        seen += iterate_steps(again, steps_of(sizes, first, last), **split)
        first = last
    assert len(seen) == len(whole)
    for batches, expected in zip(seen, whole, strict=True):
        assert_equal(batches, expected)


@pytest.mark.parametrize(("weights", "quotas"), [((1, 2), (1365, 2731)), ((3, 1), (3072, 1024))])
def test_every_block_of_a_mixture_holds_its_shares(sources, weights, quotas):
    dataset = PackedDataset(sources, sequence_length=LENGTH, weights=weights)
    for block in (0, 1, 5):
        first = block * BLOCK_WINDOWS
        ids = dataset.batch(range(first, first + BLOCK_WINDOWS))["input_ids"]
        assert Counter((ids[:, 0] >= 10_000).tolist()) == {False: quotas[0], True: quotas[1]}
        assert ((ids >= 10_000) == (ids[:, :1] >= 10_000)).all()


@pytest.fixture(params=["gpt2", "llama"])
def model(request):
    shape = {"vocabulary_size": 61, "context_length": LENGTH, "num_layers": 2, "width": 32}
    if request.param == "gpt2":
        return GPT2(GPT2Config(**shape, num_heads=4)).initialize(0).eval()
    config = LlamaConfig(**shape, num_heads=4, num_key_value_heads=2, mlp_width=48)
    return Llama(config).initialize(0).eval()


@torch.no_grad()
@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_changed_document_leaves_the_logits_of_the_others_bit_equal(tmp_path, model, packing):
    random = np.random.default_rng(0)
    documents = [random.integers(0, 61, random.integers(1, 14)) for _ in range(40)]
    write_documents(tmp_path, "a", documents)
    count = sum(map(len, documents))
    tokens = TokenArray([TokenFile(tmp_path / "a.bin", count, np.dtype("<u2"), is_shard=True)])
    options = {"fingerprint": "a" * 64, "sequence_length": LENGTH}
    plan = open_plan(tokens.iterate_ends, count, tmp_path / "plans", **options)
    plans = [plan] if packing == "best_fit" else None
    dataset = PackedDataset(tokens, sequence_length=LENGTH, document_masking=True, plans=plans)
    changed_documents = 0
    for k in range(len(dataset)):
        window = dataset.batch([k])
        ids, ends = window["input_ids"], window["document_ends"]
        logits = model(ids, document_ends=ends)
        stops = sorted({*ends[0].tolist(), LENGTH})  # of padding too
        for start, stop in zip([0, *stops], stops, strict=False):
            other = ids.clone()
            other[:, start:stop] = (other[:, start:stop] + 1) % 61
            differs = (model(other, document_ends=ends) != logits).any(-1)[0]
            assert differs[start:stop].all()
            assert not differs[:start].any() and not differs[stop:].any()
            changed_documents += 1
    assert changed_documents > 2 * len(dataset)


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
    with pytest.raises(ValueError, match="a step of 10 windows does not divide"):
        rank_micro_batches(dataset, 0, 10, micro_batch=2, world_size=2)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=64),
    rows=st.integers(1, 3),
)
@settings(deadline=None)
def test_narrow_document_ends_say_the_same(lengths, rows):
    length = 64
    ends = torch.full((rows, length), length)
    cuts = [cut for cut in np.cumsum(lengths).tolist() if cut <= length]
    ends[0, : len(cuts)] = torch.tensor(cuts, dtype=torch.int64)
    narrow = narrow_document_ends({"document_ends": ends})["document_ends"]
    documents = len(cuts) + (cuts[-1:] != [length])  # the last may end with the window
    assert narrow.shape[1] == min(w for w in (1, 2, 4, 8, 16, 32, 64) if w >= documents)
    assert torch.equal(document_index(narrow, length), document_index(ends, length))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sequence_length": 0}, "sequence_length=0 must be a whole number of at least 1"),
        ({"sequence_length": 1.5}, "sequence_length=1.5 must be a whole number"),
        ({"seed": -1}, "seed=-1 must be a whole number of at least 0"),
        ({"seed": "a"}, "seed=a must be a whole number"),
        ({"shuffle": "no"}, "shuffle=no must be "),
        ({"shuffle": False}, "shuffle=False must be "),
        ({"document_masking": "no"}, "document_masking=no must be "),
    ],
)
def test_arguments_of_a_wrong_kind_are_refused_by_name(sources, options, named):
    with pytest.raises(ValueError, match=named):
        PackedDataset(sources, **{"sequence_length": 8} | options)


def test_numbers_of_numpy_are_those_of_python(sources, dataset):
    numbers = {"sequence_length": np.int64(LENGTH), "seed": np.uint8(3)}
    other = PackedDataset(sources, weights=(1, 2), **numbers)
    assert type(other.sequence_length) is int
    assert torch.equal(other[7]["input_ids"], dataset[7]["input_ids"])
    (batch,) = rank_micro_batches(dataset, np.int64(4), np.int64(2), micro_batch=np.int32(2))
    assert torch.equal(batch["input_ids"], dataset.batch([4, 5])["input_ids"])


@pytest.mark.parametrize("tokens", [[], "data/mine", [np.arange(9)]])
def test_what_is_no_token_array_is_refused(tokens):
    with pytest.raises(ValueError, match="must be a token array, or a list of some"):
        PackedDataset(tokens, sequence_length=8)


def test_steps_take_whole_windows_and_a_device_by_name(dataset):
    with pytest.raises(ValueError, match="must be whole numbers"):
        dataset.batch([0.5])
    with pytest.raises(ValueError, match="micro_batch=0 must be a whole number of at least 1"):
        rank_micro_batches(dataset, 0, 10, micro_batch=0)
    ((batch,),) = iterate_steps(dataset, [(0, 2)], micro_batch=2, device="cpu")
    assert torch.equal(batch["input_ids"], dataset.batch([0, 1])["input_ids"])
