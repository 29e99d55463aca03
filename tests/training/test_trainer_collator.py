"""Loaders of others (a plain DataLoader, transformers' Trainer) get window after window."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.utils.data import DataLoader, Subset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from pretrain_lib import (
    IGNORED_TARGET,
    PackedDataset,
    collate_for_transformers,
    train_tokenizer,
)
from pretrain_lib.data.tokens.arrays import TokenArray, TokenFile
from tests.data.test_batches import assert_equal
from tests.data.test_streaming import LENGTH, PlainRow, one_thread, open_small, read, write_job
from tests.shards import write_documents

pytestmark = [pytest.mark.moderate, pytest.mark.usefixtures(one_thread.__name__)]

VOCABULARY = 61
BATCH, ACCUMULATED = 2, 2  # windows of a micro-batch, micro-batches of a step
WINDOWS_OF_STEP = BATCH * ACCUMULATED


@pytest.fixture(params=[False, True], ids=["plain", "document_masking"])
def packed(tmp_path, request):
    """About 26 windows of short documents."""
    random = np.random.default_rng(0)
    documents = [random.integers(0, VOCABULARY, random.integers(1, 30)) for _ in range(14)]
    write_documents(tmp_path, "text", documents)
    count = sum(map(len, documents))
    file = TokenFile(tmp_path / "text.bin", count, np.dtype("<u2"), is_shard=True)
    return PackedDataset(
        TokenArray([file]), sequence_length=LENGTH, seed=1, document_masking=request.param
    )


@pytest.fixture
def job(tmp_path):
    train_tokenizer(["ab cd ef gü ijk lm " * 20], vocabulary_size=280).save(tmp_path / "tokenizer")
    return write_job(tmp_path / "text", tmp_path / "tokenizer")


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", range(5))
def test_a_dataloader_gives_the_windows_in_order_from_any_one_on(packed, workers):
    first, count = len(packed) - 10, 50  # into the second epoch and the third
    for sampler in (None, range(first, first + count)):
        loader = DataLoader(packed, batch_size=7, sampler=sampler, num_workers=workers)
        numbers = sampler or range(len(packed))
        expected = [packed.batch(numbers[i : i + 7]) for i in range(0, len(numbers), 7)]
        assert_equal(list(loader), expected)


def test_a_dataloader_gives_the_windows_of_a_stream_and_goes_on(tmp_path, job):
    spool = open_small(job, tmp_path / "spool")
    row, dataset = PlainRow(spool, job), read(spool, document_masking=True)
    batches = iter(DataLoader(dataset, batch_size=5))
    for first in range(0, 50, 5):
        expected = [row.window(k, masked=True) for k in range(first, first + 5)]
        for name, rows in next(batches).items():
            assert rows.tolist() == [window[name] for window in expected]
    state = dataset.state_dict()
    assert state["windows"] == 50
    for again in (dataset, read(open_small(job, tmp_path / "other"), document_masking=True)):
        again.load_state_dict(state)
        for k in range(50, 60):
            window = next(iter(again))
            assert {name: t.tolist() for name, t in window.items()} == row.window(k, masked=True)
            assert again.state_dict()["windows"] == k + 1
        again.close()


MODELS = {
    "gpt2": transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=LENGTH,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    ),
    "llama": transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
    ),
}


def make_model(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MODELS[name])


def make_trainer(model, dataset, folder, *, steps, **options):
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **({"num_train_epochs": 2} if steps is None else {"max_steps": steps}),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATED,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        max_grad_norm=1.0,
        logging_steps=1,
        save_steps=3,
        remove_unused_columns=False,  # or it takes targets and document_ends away from the collator
        train_sampling_strategy="sequential",
        **options,
    )
    collate = collate_for_transformers
    return Trainer(model=model, args=arguments, train_dataset=dataset, data_collator=collate)


def run_trainer(model, dataset, folder, *, resume=None, **options):
    """Return what the model received, and the logged losses."""
    received = []
    hook = model.register_forward_pre_hook(
        lambda _, __, inputs: received.append({k: v.clone() for k, v in inputs.items()}),
        with_kwargs=True,
    )
    trainer = make_trainer(model, dataset, folder, **options)
    trainer.train(resume_from_checkpoint=resume)
    hook.remove()
    losses = {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}
    return received, losses


def sum_losses(model, batch):
    """Return the loss of a micro-batch, each document of a window computed alone."""
    total = torch.zeros(())
    ends = batch.get("document_ends", torch.full((BATCH, 1), LENGTH))
    for ids, targets, row_ends in zip(batch["input_ids"], batch["targets"], ends, strict=True):
        row_ends = sorted({*row_ends.tolist(), LENGTH})
        for start, end in zip([0, *row_ends], row_ends, strict=False):
            logits = model(input_ids=ids[None, start:end]).logits[0]
            total += F.cross_entropy(logits, targets[start:end], reduction="sum")
    return total


def train_plainly(model, batches, steps):
    """Return the losses of a loop over the same windows; all targets of a step weigh the same."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0), []
    for step in range(steps):
        windows = batches[step * ACCUMULATED : (step + 1) * ACCUMULATED]
        targets = sum(int((batch["targets"] != IGNORED_TARGET).sum()) for batch in windows)
        loss = sum(sum_losses(model, batch) for batch in windows) / targets
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def assert_received(received, batches):
    for inputs, batch in zip(received, batches, strict=True):
        assert torch.equal(inputs["input_ids"], batch["input_ids"])
        assert torch.equal(inputs["shift_labels"], batch["targets"])
        assert ("position_ids" in inputs) == ("document_ends" in batch)
        assert inputs.get("attention_mask") is None


@pytest.mark.parametrize("name", MODELS)
def test_the_trainer_of_transformers_trains_on_the_windows_in_order(tmp_path, packed, name):
    steps, windows = 8, 8 * WINDOWS_OF_STEP
    assert len(packed) < windows  # its second epoch is not the first one again
    model = make_model(name)
    plain, whole = copy.deepcopy(model), copy.deepcopy(model)
    dataset = Subset(packed, range(windows))
    batches = [packed.batch(range(k, k + BATCH)) for k in range(0, windows, BATCH)]
    received, losses = run_trainer(whole, dataset, tmp_path / "whole", steps=steps)
    assert_received(received, batches)
    expected = train_plainly(plain, batches, steps)
    assert list(losses.values()) == pytest.approx(expected, abs=1e-5)
    # Resumed from its own checkpoint, it goes on with the next window.
    again, rest = run_trainer(
        copy.deepcopy(model),
        dataset,
        tmp_path / "whole",
        steps=steps,
        resume=str(tmp_path / "whole" / "checkpoint-6"),
    )
    assert_received(again, batches[6 * ACCUMULATED :])
    assert {step: rest[step] for step in (7, 8)} == {step: losses[step] for step in (7, 8)}


@pytest.mark.parametrize("packed", [True], indirect=True, ids=["document_masking"])
def test_a_plain_loop_without_a_cache_keeps_documents_apart(packed):
    model = make_model("llama")
    model.config.use_cache = False
    batches = [packed.batch(range(k, k + BATCH)) for k in range(0, len(packed) - 1, BATCH)]
    loader = DataLoader(packed, batch_size=BATCH, collate_fn=collate_for_transformers)
    for batch, inputs in zip(batches, loader, strict=False):
        targets = int((inputs["shift_labels"] != IGNORED_TARGET).sum())
        expected = sum_losses(model, batch).item() / targets
        assert model(**inputs).loss.item() == pytest.approx(expected, abs=1e-5)
        # Several processes that share a stream concatenate what they receive: only tensors.
        assert all(isinstance(each, torch.Tensor) for each in inputs.values())


def test_each_epoch_of_the_trainer_has_windows_of_its_own(tmp_path, packed):
    model, size = make_model("gpt2"), len(packed)
    received, _ = run_trainer(copy.deepcopy(model), packed, tmp_path, steps=None)
    expected = packed.batch(range(2 * size))["input_ids"]
    assert not torch.equal(expected[:size], expected[size:])
    assert torch.equal(torch.cat([inputs["input_ids"] for inputs in received]), expected)
    # Resumed within its second epoch, it goes on with the next window.
    resume = str(tmp_path / "checkpoint-9")
    again, _ = run_trainer(model, packed, tmp_path, steps=None, resume=resume)
    rest = torch.cat([inputs["input_ids"] for inputs in again])
    assert 0 < len(rest) < size
    assert torch.equal(rest, expected[-len(rest) :])


def test_the_trainer_of_transformers_trains_on_a_stream_and_goes_on(tmp_path, job):
    spool, model = open_small(job, tmp_path / "spool"), make_model("llama")
    row, dataset = PlainRow(spool, job), read(spool, document_masking=True)
    received, losses = run_trainer(copy.deepcopy(model), dataset, tmp_path / "run", steps=7)
    dataset.close()
    assert dataset.state_dict()["windows"] >= 7 * WINDOWS_OF_STEP  # it may read ahead
    for number, inputs in enumerate(received):
        expected = [row.window(BATCH * number + i, masked=True) for i in range(BATCH)]
        assert inputs["input_ids"].tolist() == [window["input_ids"] for window in expected]
        assert inputs["shift_labels"].tolist() == [window["targets"] for window in expected]
    assert len(received) == 7 * ACCUMULATED
    dataset = read(spool, document_masking=True)
    dataset.load_state_dict({"windows": 3 * WINDOWS_OF_STEP})
    again, rest = run_trainer(
        model,
        dataset,
        tmp_path / "run",
        steps=7,
        ignore_data_skip=True,
        resume=str(tmp_path / "run" / "checkpoint-3"),
    )
    dataset.close()
    assert len(again) == 4 * ACCUMULATED
    for inputs, other in zip(again, received[3 * ACCUMULATED :], strict=True):
        assert all(torch.equal(inputs[name], other[name]) for name in other)
    assert {step: rest[step] for step in range(4, 8)} == {s: losses[s] for s in range(4, 8)}
