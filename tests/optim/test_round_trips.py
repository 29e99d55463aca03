"""An optimizer that torch or Accelerate has copied makes the same next steps, bit for bit."""

import copy
import pickle

import pytest
import torch
from accelerate import Accelerator

from pretrain_lib import (
    GPT2,
    GPT2Config,
    TrainingState,
    build_adamw,
    build_muon,
    load_checkpoint,
    save_checkpoint,
)

SHAPE = GPT2Config(
    vocabulary_size=31,
    vocabulary_multiple=1,  # padding rows, which no checkpoint holds, would get gradients here
    context_length=8,
    num_layers=2,
    num_heads=2,
    width=16,
)
OPTIMIZERS = {
    "AdamW": lambda model: build_adamw(model, learning_rate=1e-2),
    "AdamWBf16": lambda model: build_adamw(model, learning_rate=1e-2, moments="bf16"),
    "Muon": lambda model: build_muon(model, learning_rate=1e-2, momentum=0.8),
    "MuonBf16": lambda model: build_muon(
        model, learning_rate=1e-2, momentum=0.8, moments="bf16", dtype=torch.bfloat16
    ),
}


def by_load_state_dict(model, optimizer, *_):
    optimizer.load_state_dict(optimizer.state_dict())
    return model, optimizer


def by_checkpoint(model, optimizer, kind, folder):
    path = save_checkpoint(folder, TrainingState(), model, optimizer, tokenizer=None, manifest={})
    again = GPT2(SHAPE)
    fresh = OPTIMIZERS[kind](again)
    load_checkpoint(path, again, fresh)
    return Accelerator(cpu=True).prepare(again, fresh)


def by_file(model, optimizer, kind, folder):
    """Save and load as torch documents it, into another model and optimizer."""
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "file")
    again = GPT2(SHAPE)
    fresh = OPTIMIZERS[kind](again)
    stored = torch.load(folder / "file")
    again.load_state_dict(stored["model"])
    fresh.load_state_dict(stored["optimizer"])
    return again, fresh


def by_accelerate(model, optimizer, kind, folder):
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model, optimizer)
    accelerator.save_state(folder)
    other = Accelerator(cpu=True)
    again = GPT2(SHAPE).initialize(1)
    prepared = other.prepare(again, OPTIMIZERS[kind](again))
    other.load_state(folder)
    return prepared


COPIES = {
    "load_state_dict": by_load_state_dict,
    "checkpoint": by_checkpoint,
    "torch.save": by_file,
    "deepcopy": lambda *both: copy.deepcopy(both[:2]),
    "pickle": lambda *both: pickle.loads(pickle.dumps(both[:2])),
    "save_state": by_accelerate,
}


def update(model, optimizer, numbers):
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_next_steps_of_a_copy_are_those_of_the_original(kind, way, tmp_path):
    expected, model = (GPT2(SHAPE).initialize(0) for _ in range(2))
    unbroken, optimizer = OPTIMIZERS[kind](expected), OPTIMIZERS[kind](model)
    update(expected, unbroken, range(5))
    update(model, optimizer, range(2))
    model, optimizer = COPIES[way](model, optimizer, kind, tmp_path)
    assert type(getattr(optimizer, "optimizer", optimizer)) is type(unbroken)
    update(model, optimizer, range(2, 5))
    for one, other in zip(expected.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
        assert unbroken.state[one].keys() == optimizer.state[other].keys()
        for name, value in unbroken.state[one].items():
            assert optimizer.state[other][name].dtype == value.dtype
            assert torch.equal(optimizer.state[other][name], value)
