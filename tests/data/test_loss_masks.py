"""Loss masks of datatrove: what they leave out is no target, however windows are filled."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datatrove.pipeline.tokens.tokenizer import TokenizedFile
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain_lib import (
    GPT2,
    GPT2Config,
    HeldOut,
    choose_stretches,
    open_corpus,
    train_step,
    validate,
)
from pretrain_lib.corpus.corpus import build_dataset
from pretrain_lib.data.inspection import inspect_data
from pretrain_lib.data.text.tokenizer import load_tokenizer
from pretrain_lib.data.tokens.foreign import open_foreign
from pretrain_lib.data.windows.batches import PackedDataset
from pretrain_lib.data.windows.best_fit import open_plan
from pretrain_lib.data.windows.packing import IGNORED_TARGET
from tests.conftest import change

LENGTH = 12
MODEL = GPT2Config(vocabulary_size=61, context_length=LENGTH, num_layers=2, num_heads=2, width=16)


def write_masked(path, lengths, *, below, masked=0.4, seed=0):
    """Write a `.ds` with its mask by datatrove; return its ids and mask."""
    rng = np.random.default_rng(seed)
    file = TokenizedFile(str(path.parent), path.name, token_size=2, save_loss_metadata=True)
    ids, counts = [], []
    for length in lengths:
        own, counted = rng.integers(0, below, length), rng.random(length) >= masked
        file.write(own.tolist(), counted)
        ids, counts = [*ids, *own.tolist()], [*counts, *counted.tolist()]
    file.close()
    return np.array(ids), np.array(counts)


@settings(deadline=None, max_examples=40)
@given(
    parts=st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=8), min_size=1, max_size=3),
    length=st.integers(1, 12),
    documents_apart=st.booleans(),
    best_fit=st.booleans(),
    seed=st.integers(0, 9),
)
def test_masked_tokens_are_targets_in_no_way_of_packing(
    tmp_path_factory, parts, length, documents_apart, best_fit, seed
):
    folder = tmp_path_factory.mktemp("masked")
    parts = [[20], *parts]  # at least a window and its last target
    written = [
        write_masked(folder / f"{i}.ds", lengths, below=2**16, seed=seed + i)
        for i, lengths in enumerate(parts)
    ]
    counts = np.concatenate([counts for _, counts in written])
    # Ids are the places, so that a target tells which token it is.
    for number, (ids, _) in enumerate(written):
        first = sum(len(own) for own, _ in written[:number])
        np.arange(first, first + len(ids), dtype="<u2").tofile(folder / f"{number}.ds")
    tokens = open_foreign(folder / "*.ds", vocabulary_size=2**16)
    begins = {0, *np.cumsum([n for lengths in parts for n in lengths]).tolist()}
    plans = None
    if best_fit:
        options = {"fingerprint": "f" * 64, "sequence_length": length}
        plans = [open_plan(tokens.iterate_ends, len(tokens), folder / "plans", **options)]
    dataset = PackedDataset(
        tokens, sequence_length=length, document_masking=documents_apart, plans=plans
    )
    for index in range(len(dataset)):
        window = {name: values.tolist() for name, values in dataset[index].items()}
        for place, target in zip(window["input_ids"], window["targets"], strict=True):
            follows = place + 1
            is_padding = best_fit and place == 0 and target == IGNORED_TARGET
            left_out = follows == len(tokens) or not counts[follows]
            left_out = left_out or is_padding or (documents_apart and follows in begins)
            assert target == (IGNORED_TARGET if left_out else follows)


def test_training_on_masked_targets_equals_a_plain_loop(tmp_path):
    ids, counts = write_masked(tmp_path / "0.ds", [30, 200, 7, 150], below=61)
    dataset = PackedDataset(
        open_foreign(tmp_path / "0.ds", vocabulary_size=61), sequence_length=LENGTH, seed=3
    )
    model, plain = GPT2(MODEL).initialize(0), GPT2(MODEL).initialize(0)
    # Not AdamW: where a gradient is zero, as for the biases of keys, it divides rounding by itself.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.3, momentum=0.9)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    accelerator, targets = Accelerator(cpu=True), []
    for step in range(5):
        batches = [dataset.batch([6 * step + i for i in rows]) for rows in ((0, 1), (2, 3), (4, 5))]
        options = {"learning_rate": 0.3, "max_grad_norm": 1.0, "seed": 0, "step": step}
        result = train_step(accelerator, model, optimizer, batches, **options)
        starts = dataset.order.locate(np.arange(6 * step, 6 * step + 6))[2]
        own = torch.from_numpy(np.stack([ids[s : s + LENGTH + 1] for s in starts]))
        weight = torch.from_numpy(np.stack([counts[s + 1 : s + LENGTH + 1] for s in starts]))
        losses = -plain(own[:, :-1]).log_softmax(-1).gather(-1, own[:, 1:, None])[..., 0]
        loss = (losses * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        plain_optimizer.step()
        plain_optimizer.zero_grad()
        assert result.targets == weight.sum()
        assert result.loss == pytest.approx(loss.item(), abs=1e-6)
        targets.append(result.targets)
    for ours, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, other, atol=1e-6, rtol=0)
    moved = [(a - b).abs().max() for a, b in zip(model.parameters(), before, strict=True)]
    assert max(moved) > 0.1
    assert max(targets) < 6 * LENGTH


def test_validation_is_the_mean_over_the_tokens_that_count(tmp_path):
    ids, counts = write_masked(tmp_path / "0.ds", [40, 30, 30], below=61)
    tokens = open_foreign(tmp_path / "0.ds", vocabulary_size=61)
    stretches = choose_stretches([HeldOut("all", tokens, "")], LENGTH, max_tokens=None)
    model = GPT2(MODEL).initialize(0)
    result = validate(Accelerator(cpu=True), model, stretches, micro_batch=3)
    losses = []
    for start in range(0, stretches[0].windows * LENGTH, LENGTH):
        window = torch.from_numpy(ids[start : start + LENGTH + 1])
        with torch.no_grad():
            chances = model(window[None, :-1])[0].log_softmax(-1)
        own = -chances[torch.arange(LENGTH), window[1:]]
        losses.append(own[torch.from_numpy(counts[start + 1 : start + LENGTH + 1])])
    losses = torch.cat(losses)
    assert result.targets == len(losses)
    assert result.loss == pytest.approx(losses.mean().item(), abs=1e-5)


def test_bits_per_byte_are_not_given_for_masked_text(tmp_path, prepared):
    write_masked(tmp_path / "0.ds", [60], below=61)
    tokens = open_foreign(tmp_path / "0.ds", vocabulary_size=61)
    (stretch,) = choose_stretches(
        [HeldOut("all", tokens, "")],
        LENGTH,
        max_tokens=None,
        tokenizer=load_tokenizer(prepared / "tokenizer"),
    )
    assert stretch.text_bytes is None


def test_inspect_says_how_many_tokens_count(tmp_path):
    _, counts = write_masked(tmp_path / "0.ds", [100, 50], below=61)
    lines = "\n".join(inspect_data([tmp_path / "0.ds"], sequence_length=LENGTH, window=0))
    assert f"{counts.sum()} tokens ({counts.mean():.2%}) count, by the loss mask" in lines


def test_a_mask_of_another_size_is_refused(tmp_path):
    write_masked(tmp_path / "0.ds", [100], below=61)
    mask = tmp_path / "0.ds.loss"
    mask.write_bytes(mask.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"0.ds.loss: 99 bytes, but 0.ds has 100 tokens"):
        open_foreign(tmp_path / "0.ds", vocabulary_size=61)


def test_a_mask_of_other_values_is_refused_at_the_read_that_meets_them(tmp_path):
    write_masked(tmp_path / "0.ds", [100], below=61)
    (tmp_path / "0.ds.loss").write_bytes(bytes(50) + b"\2" + bytes(49))
    tokens = open_foreign(tmp_path / "0.ds", vocabulary_size=61)
    assert not tokens.counts(0, 50).any()
    with pytest.raises(ValueError, match=r"0.ds.loss: not a loss mask .* tokens 40 and 60"):
        tokens.counts(40, 20)


def test_a_pattern_with_and_without_masks_is_refused(tmp_path):
    for number in range(2):
        write_masked(tmp_path / f"{number}.ds", [100], below=61)
    (tmp_path / "1.ds.loss").unlink()
    with pytest.raises(ValueError, match=r"1.ds has no loss mask \(1.ds.loss\), but other files"):
        open_foreign(tmp_path / "*.ds", vocabulary_size=61)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_run_reads_the_mask_and_its_fingerprint_knows_it(recipe, tmp_path, packing, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _, counts = write_masked(tmp_path / "0.ds", [40] * 60, below=61)
    path = str(tmp_path / "0.ds")
    config = change(recipe, data={"path": path, "packing": packing, "validation": "none"})
    corpus = open_corpus(config)
    dataset = build_dataset(config, corpus)
    masked = np.mean([(dataset[i]["targets"] == IGNORED_TARGET).float().mean() for i in range(9)])
    assert 1 - counts.mean() - 0.1 < masked < 1
    (tmp_path / "0.ds.loss").write_bytes(bytes(len(counts) - 1) + b"\1")
    assert open_corpus(config).fingerprint != corpus.fingerprint


def test_a_mask_that_leaves_out_every_token_is_refused(recipe, tmp_path):
    write_masked(tmp_path / "0.ds", [40] * 60, below=61, masked=1.1)
    write_masked(tmp_path / "1.ds", [40] * 60, below=61)
    path, other = str(tmp_path / "0.ds"), str(tmp_path / "1.ds")
    with pytest.raises(ValueError, match="0.ds: its loss mask .* leaves out every token"):
        open_corpus(change(recipe, data={"path": path, "validation": "none"}))
    with pytest.raises(ValueError, match="the loss mask of 0.ds leaves out each of the"):
        open_corpus(change(recipe, data={"path": other, "validation": path}))
