"""The optimizers that a checkpoint holds: those that keep scalars and tensors like a parameter."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from pretrain_lib import GPT2, build_adamw, build_muon, load_checkpoint
from pretrain_lib.checkpoint.folders import TRAINING
from pretrain_lib.checkpoint.parts import moments_file
from pretrain_lib.tensors.piece_files import read_note
from pretrain_lib.tensors.pieces import local_piece
from tests.checkpoint.test_checkpoint import GPT2_SHAPE, batch, build, save, steps

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, centered=True),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=1e-2),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_on_bit_equal_with_any_optimizer(kind, tmp_path):
    model = build(GPT2_SHAPE)
    optimizer = OPTIMIZERS[kind](model.parameters())
    steps(model, optimizer, range(3))
    path = save(tmp_path, 3, model, optimizer)
    expected = steps(model, optimizer, range(3, 6))
    again = build(GPT2_SHAPE)
    fresh = OPTIMIZERS[kind](again.parameters())
    load_checkpoint(path, again, fresh)
    assert steps(again, fresh, range(3, 6)) == expected
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
        assert optimizer.state[one].keys() == fresh.state[other].keys()
        for name, value in optimizer.state[one].items():
            assert value.dtype == fresh.state[other][name].dtype
            assert torch.equal(value, fresh.state[other][name])


def test_one_without_a_state_is_loaded(tmp_path):
    model = build(GPT2_SHAPE)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    steps(model, optimizer, range(2))
    path = save(tmp_path, 2, model, optimizer)
    load_checkpoint(path, model, optimizer)
    assert not any(optimizer.state.values())


@pytest.mark.parametrize("build_own", [build_adamw, build_muon])
def test_adamw_and_muon_are_saved_as_ever(build_own, tmp_path):
    model = build(GPT2_SHAPE)
    optimizer = build_own(model, learning_rate=1e-2)
    steps(model, optimizer, range(1))
    path = save(tmp_path, 1, model, optimizer)
    assert read_note(path / moments_file(0, 1), "optimizer") is None


@pytest.mark.parametrize(
    ("saved", "loaded", "message"),
    [
        ("SGD", "Adagrad", "holds the state of SGD, the optimizer is Adagrad"),
        ("NAdam", None, "holds the state of NAdam, the optimizer is AdamW or Muon"),
        (None, "SGD", "holds the state of AdamW or Muon, the optimizer is SGD"),
    ],
)
def test_the_state_of_another_is_refused(saved, loaded, message, tmp_path):
    def of(kind, model):
        if kind is None:
            return build_adamw(model, learning_rate=1e-2)
        return OPTIMIZERS[kind](model.parameters())

    model = build(GPT2_SHAPE)
    optimizer = of(saved, model)
    steps(model, optimizer, range(1))
    path = save(tmp_path, 1, model, optimizer)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path, model, of(loaded, model))


BUILDERS = {
    "AdamW": lambda model: build_adamw(model, learning_rate=1e-2),
    "Muon": lambda model: build_muon(model, learning_rate=1e-2),
    "momentum": lambda model: OPTIMIZERS["SGD"](model.parameters()),
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2),  # keeps nothing
}


@pytest.mark.parametrize("kind", BUILDERS)
def test_an_optimizer_of_another_model_is_refused_before_anything_is_loaded(kind, tmp_path):
    model = build(GPT2_SHAPE)
    optimizer = BUILDERS[kind](model)
    steps(model, optimizer, range(1))
    path = save(tmp_path, 1, model, optimizer)
    other, unused = build(GPT2_SHAPE), build(GPT2_SHAPE)
    before = [parameter.detach().clone() for parameter in other.parameters()]
    with pytest.raises(ValueError, match="^the optimizer holds other tensors than the model"):
        load_checkpoint(path, other, BUILDERS[kind](unused))
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


@pytest.mark.parametrize("kind", [kind for kind in BUILDERS if kind != "SGD"])
def test_moments_of_a_parameter_that_the_optimizer_leaves_alone_are_refused(kind, tmp_path):
    model = build(GPT2_SHAPE)
    optimizer = BUILDERS[kind](model)
    steps(model, optimizer, range(1))
    path = save(tmp_path, 1, model, optimizer)
    fewer = BUILDERS[kind](model)
    for group in fewer.param_groups:
        group["params"] = [p for p in group["params"] if p is not model.head_weight]
    with pytest.raises(ValueError, match="of transformer.wte.weight, which the optimizer does not"):
        load_checkpoint(path, model, fewer)


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_parameter_that_had_no_gradient_yet_begins_without_moments(kind, tmp_path):
    class Own(GPT2):
        def __init__(self, config):
            super().__init__(config)
            self.experts = torch.nn.ModuleList([torch.nn.Linear(16, 16)])

    models = [Own(GPT2_SHAPE).initialize(0) for _ in range(2)]
    optimizers = [BUILDERS[kind](model) for model in models]
    steps(models[0], optimizers[0], range(2))
    load_checkpoint(save(tmp_path, 2, models[0], optimizers[0]), models[1], optimizers[1])
    for model, optimizer in zip(models, optimizers, strict=True):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


class Counting(torch.optim.SGD):
    """Counts in a Python number, as some optimizers do."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["updates"] = self.state[parameter].get("updates", 0) + 1


class Exact(torch.optim.SGD):
    """Keeps a tensor of a type that no file here has."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["total"] = parameter.detach().double()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torch.optim.Adafactor, r"Adafactor keeps \w+ of shape \(.*\) for \S+, and a checkpoint"),
        (Exact, r"Exact keeps total in torch\.float64 for \S+, and a checkpoint"),
        (Counting, r"Counting keeps updates, a int for \S+, and a checkpoint"),
    ],
)
def test_what_cannot_be_held_is_refused_before_anything_is_written(make, message, tmp_path):
    model = build(GPT2_SHAPE)
    optimizer = make(model.parameters(), lr=1e-2)
    steps(model, optimizer, range(1))
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "run", 1, model, optimizer)
    assert not (tmp_path / "run").exists()


def test_the_state_of_what_is_no_parameter_is_refused(tmp_path):
    model = build(GPT2_SHAPE)
    optimizer = build_adamw(model, learning_rate=1e-2)
    steps(model, optimizer, range(1))
    optimizer.state["averages"] = {"step": torch.zeros(())}
    with pytest.raises(ValueError, match=re.escape("AdamW keeps a state for 'averages'")):
        save(tmp_path, 1, model, optimizer)
    assert not list(tmp_path.glob(f"*/{TRAINING}"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SGD", "NAdam"])
def test_one_process_reads_the_state_that_two_wrote_in_shards(kind, tmp_path):
    arguments = (kind, str(tmp_path))
    torch.multiprocessing.start_processes(save_sharded, arguments, 2, start_method="forkserver")
    model, same = build(GPT2_SHAPE), build(GPT2_SHAPE)
    optimizer, expected = (OPTIMIZERS[kind](m.parameters()) for m in (model, same))
    load_checkpoint(tmp_path / "step-00000002", model, optimizer)
    update(same, expected, 2)
    for one, other in zip(model.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(one, other)
        assert optimizer.state[one].keys() == expected.state[other].keys() != set()
        for name, value in optimizer.state[one].items():
            torch.testing.assert_close(value, expected.state[other][name])


def save_sharded(rank, kind, folder):
    """Train as one of two processes that hold shards, save, and load what was saved."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    model = build(GPT2_SHAPE)
    for module in (*model.blocks, model):
        fully_shard(module)
    optimizer = OPTIMIZERS[kind](model.parameters())
    update(model, optimizer, 2)
    path = save(Path(folder), 2, model, optimizer)
    dist.barrier()
    fresh = OPTIMIZERS[kind](model.parameters())
    load_checkpoint(path, model, fresh)
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            again = fresh.state[parameter][name]
            assert type(again) is type(value)
            assert torch.equal(local_piece(again).tensor, local_piece(value).tensor)
    dist.destroy_process_group()


def update(model, optimizer, count):
    """Make updates with the same data on every process."""
    for number in range(count):
        (data,) = batch(number)
        loss, targets = model(**data)
        (loss / targets).backward()
        optimizer.step()
        optimizer.zero_grad()
