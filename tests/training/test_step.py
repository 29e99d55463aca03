"""One optimizer step: every target weighs the same, however the batch is cut."""

import math
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config as HFConfig
from transformers import GPT2LMHeadModel

from pretrain_lib import GPT2, IGNORED_TARGET, GPT2Config, build_adamw, build_muon, train_step
from pretrain_lib.training import step as step_module
from pretrain_lib.training.step import Accumulated, accumulate_gradients, apply_update

CONFIG = GPT2Config(vocabulary_size=61, context_length=12, num_layers=2, num_heads=2, width=16)


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def make_batch(rows, *, ignored, seed=0):
    """Return `(rows, 12)` inputs and targets, with `ignored[i]` targets of row i left out."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(CONFIG.vocabulary_size, (rows, 13), generator=generator)
    targets = ids[:, 1:].clone()
    for row, count in enumerate(ignored):
        targets[row, torch.randperm(12, generator=generator)[:count]] = IGNORED_TARGET
    return {"input_ids": ids[:, :-1], "targets": targets}


def cut(batch, size):
    rows = len(batch["targets"])
    return [{k: v[i : i + size] for k, v in batch.items()} for i in range(0, rows, size)]


def step(accelerator, model, optimizer, micro_batches, **options):
    defaults = {"learning_rate": 1e-2, "max_grad_norm": 1.0, "seed": 0, "step": 0}
    return train_step(accelerator, model, optimizer, micro_batches, **defaults | options)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=4, max_size=4).filter(lambda i: sum(i) < 48))
def test_one_micro_batch_of_four_equals_four_of_one(ignored):
    accelerator = Accelerator(cpu=True)
    batch, results, weights = make_batch(4, ignored=ignored), [], []
    for size in (4, 2, 1):
        model = GPT2(CONFIG).initialize(0)
        optimizer = build_adamw(model, learning_rate=1e-2)
        results.append(step(accelerator, model, optimizer, cut(batch, size)))
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    for result, weight in zip(results, weights, strict=True):
        assert result.targets == 48 - sum(ignored)
        assert result.loss == pytest.approx(results[0].loss, abs=1e-5)
        assert result.grad_norm == pytest.approx(results[0].grad_norm, rel=1e-4)
        assert weight.isfinite().all()


def test_the_gradient_is_that_of_the_mean_over_all_targets(accelerator):
    batch = make_batch(4, ignored=[0, 3, 11, 12])
    model = GPT2(CONFIG).initialize(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = step(
        accelerator, model, optimizer, cut(batch, 1), learning_rate=1.0, max_grad_norm=1e9
    )
    reference = GPT2(CONFIG).initialize(0).double()
    logits = reference(batch["input_ids"])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
    loss.backward()
    assert result.loss == pytest.approx(loss.item(), abs=1e-6)
    for name, parameter in reference.named_parameters():
        moved = before[name] - dict(model.named_parameters())[name].detach()
        torch.testing.assert_close(moved.double(), parameter.grad, atol=2e-6, rtol=1e-3)


def test_the_gradient_is_clipped_to_the_norm_and_the_norm_before_is_reported(accelerator):
    batch = [make_batch(2, ignored=[])]
    moves = []
    for max_norm in (1e9, 0.01):
        model = GPT2(CONFIG).initialize(0)
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        result = step(
            accelerator, model, optimizer, batch, learning_rate=1.0, max_grad_norm=max_norm
        )
        after = torch.cat([p.detach().flatten() for p in model.parameters()])
        moves.append((result.grad_norm, float((after - before).norm())))
    assert moves[0][0] == pytest.approx(moves[0][1], rel=1e-3)
    assert moves[1][0] == pytest.approx(moves[0][0])
    assert moves[1][1] == pytest.approx(0.01, rel=1e-2)


KINDS = {
    "sgd": lambda p, fused: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=fused),
    "adagrad": lambda p, fused: torch.optim.Adagrad(p, lr=0.1, fused=fused),
    "adam": lambda p, fused: torch.optim.Adam(p, lr=0.1, fused=fused),
    "adamw": lambda p, fused: torch.optim.AdamW(p, lr=0.1, fused=fused),
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_first_update_that_is_left_out_leaves_nothing_behind(
    accelerator, monkeypatch, kind, fused
):
    # What a tensor may hold that was made but never written.
    monkeypatch.setattr(torch, "empty_like", lambda x, **_: torch.full_like(x, torch.nan))
    weights = []
    for skips in (True, False):
        model = GPT2(CONFIG).initialize(0)
        optimizer = KINDS[kind](model.parameters(), fused)
        if skips:
            nothing = [make_batch(1, ignored=[12])]  # a mean over no targets
            assert step(accelerator, model, optimizer, nothing).skipped
        step(accelerator, model, optimizer, [make_batch(2, ignored=[])])
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize("fused", [True, False])
def test_an_update_that_is_not_finite_is_left_out(accelerator, fused):
    model = GPT2(CONFIG).initialize(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    batch = [make_batch(2, ignored=[])]
    step(accelerator, model, optimizer, batch)
    broken = model.transformer["ln_f"].bias
    with torch.no_grad():
        broken[0] = torch.inf
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    moments = optimizer.state[broken]["exp_avg"].clone()
    assert step(accelerator, model, optimizer, batch).skipped
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert torch.equal(moments, optimizer.state[broken]["exp_avg"])
    assert float(optimizer.state[broken]["step"]) == 1
    with torch.no_grad():
        broken[0] = 0.0
    assert not step(accelerator, model, optimizer, batch).skipped
    assert float(optimizer.state[broken]["step"]) == 2


@pytest.mark.parametrize(
    ("loss", "gradient", "limits"),
    [
        (1.0, 1.0, {"norm_limit": 0.5}),
        (1.0, 1.0, {"loss_limit": 0.5}),
        (math.inf, 1.0, {}),
        (math.nan, 1.0, {}),
        (1.0, math.inf, {}),
        (1.0, math.nan, {}),
    ],
)
@pytest.mark.parametrize("fused", [True, False])
def test_each_reason_alone_leaves_an_update_out(accelerator, loss, gradient, limits, fused):
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    before = model.weight.item()
    model.weight.grad = torch.full((1, 1), gradient)
    accumulated = Accumulated(torch.tensor(loss), torch.tensor(1))
    options = {"learning_rate": 0.1, "max_grad_norm": 1.0} | limits
    assert apply_update(accelerator, model, optimizer, accumulated, **options).skipped
    assert model.weight.item() == before


def test_every_group_follows_the_scheduled_rate(accelerator):
    model = GPT2(CONFIG).initialize(0)
    rates = {"learning_rate": 1e-2, "matrix_learning_rate": 1e-3, "embedding_learning_rate": 5e-2}
    optimizer = build_adamw(model, **rates)
    step(accelerator, model, optimizer, [make_batch(2, ignored=[])], learning_rate=5e-3)
    found = {group["lr"] for group in optimizer.param_groups}
    assert sorted(found) == pytest.approx([5e-4, 5e-3, 2.5e-2])


FUSED = {
    "adamw": build_adamw,
    "adamw in bf16": partial(build_adamw, moments="bf16"),
    "muon": build_muon,
    "muon in bf16": partial(build_muon, moments="bf16"),
}


@pytest.mark.parametrize("kind", FUSED)
def test_a_loop_of_another_kind_updates_after_an_update_was_left_out(accelerator, kind):
    model = GPT2(CONFIG).initialize(0)
    optimizer = FUSED[kind](model, learning_rate=1e-2)
    attributes = vars(optimizer).keys() | set()
    options = {"learning_rate": 1e-2, "max_grad_norm": 1.0, "loss_limit": 0.0}
    model(**make_batch(2, ignored=[]))[0].backward()
    accumulated = Accumulated(torch.tensor(1.0), torch.tensor(1))
    assert apply_update(accelerator, model, optimizer, accumulated, **options).skipped
    assert vars(optimizer).keys() == attributes
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(**make_batch(2, ignored=[]))[0].backward()
    optimizer.step()
    assert not any(torch.equal(before[n], p) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0 must be a number above 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0 must be a number above 0"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm=nan must be a number above 0"),
        ({"max_grad_norm": None}, "max_grad_norm=None must be a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be a number of at least 0"),
        ({"learning_rate": -1e-3}, "learning_rate=-0.001 must be a number of at least 0"),
    ],
)
def test_a_norm_or_rate_that_would_spoil_the_weights_is_refused(accelerator, options, message):
    model = GPT2(CONFIG).initialize(0)
    optimizer = build_adamw(model, learning_rate=1e-2)
    with pytest.raises(ValueError, match=f"^{message}"):
        step(accelerator, model, optimizer, [make_batch(2, ignored=[])], **options)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_infinite_norm_clips_nothing(accelerator):
    weights = []
    for norm in (float("inf"), 1e9):
        model = GPT2(CONFIG).initialize(0)
        optimizer = build_adamw(model, learning_rate=1e-2)
        step(accelerator, model, optimizer, [make_batch(2, ignored=[])], max_grad_norm=norm)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_dropout_depends_on_seed_step_and_micro_batch_alone(accelerator):
    config = GPT2Config(**{**vars(CONFIG), "dropout": 0.3})
    batch = cut(make_batch(2, ignored=[]), 1)

    def loss(*, micro_batches=batch, drawn=0, **options):
        torch.rand(drawn)  # whatever else used the generator
        model = GPT2(config).initialize(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        return step(accelerator, model, optimizer, micro_batches, **options).loss

    assert loss() == loss(drawn=5)
    assert loss() != loss(seed=1)
    assert loss() != loss(step=1)
    twice = [batch[0], batch[0]]
    assert loss(micro_batches=twice) != pytest.approx(loss(micro_batches=twice[:1]), abs=1e-6)


@pytest.mark.parametrize("processes", [2, 4])
def test_dropout_does_not_depend_on_the_number_of_processes(accelerator, monkeypatch, processes):
    model = GPT2(GPT2Config(**{**vars(CONFIG), "dropout": 0.3})).initialize(0)
    batches = cut(make_batch(4, ignored=[]), 1)
    monkeypatch.setattr(step_module, "count_targets", lambda _, own: (own, torch.tensor(48)))

    def loss(rank, processes):
        monkeypatch.setattr(Accelerator, "num_processes", processes)
        monkeypatch.setattr(Accelerator, "process_index", rank)
        own = batches[rank::processes]
        return accumulate_gradients(accelerator, model, own, seed=0, step=0).loss_sum.item()

    shared = sum(loss(rank, processes) for rank in range(processes))
    assert shared == pytest.approx(loss(0, 1), rel=1e-6)


def test_the_environment_cannot_change_the_accumulation(monkeypatch):
    batch, losses = cut(make_batch(4, ignored=[1, 5, 0, 2]), 1), []
    for value in (None, "8"):
        if value:
            monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", value)
        model = GPT2(CONFIG).initialize(0)
        optimizer = build_adamw(model, learning_rate=1e-2)
        results = [step(Accelerator(cpu=True), model, optimizer, batch, step=i) for i in range(3)]
        losses.append([(r.loss, r.grad_norm) for r in results])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("count", [2**24 + 1, 2**25 - 1, 2**40 + 2**20 + 1])
def test_targets_are_counted_exactly_beyond_what_fp32_holds(accelerator, count):
    model = torch.nn.Linear(2, 2)
    optimizer = build_adamw(model, learning_rate=1e-3)
    model(torch.ones(1, 2)).sum().backward()
    accumulated = Accumulated(torch.tensor(1.0), torch.tensor(count))
    options = {"learning_rate": 0.0, "max_grad_norm": 1.0}
    result = apply_update(accelerator, model, optimizer, accumulated, **options)
    assert result.targets == count


def test_a_model_of_transformers_that_is_not_wrapped_is_refused_with_the_remedy(accelerator):
    shape = {"n_positions": 12, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(HFConfig(vocab_size=61, **shape))
    optimizer = build_adamw(model, learning_rate=1e-2)
    with pytest.raises(ValueError, match="^model.* must return .* not CausalLM.* CausalLMAdapter$"):
        step(accelerator, model, optimizer, [make_batch(2, ignored=[])])


WRONG_BATCHES = {
    "micro_batches is empty": [],
    "micro_batches must be a list .* put it into a list": make_batch(1, ignored=[]),
    r"micro_batches\[1\] has input_ids, labels; .*'targets'": [
        make_batch(1, ignored=[]),
        {"input_ids": torch.zeros(1, 12), "labels": torch.zeros(1, 12)},
    ],
    r"micro_batches\[0\] is Tensor; ": torch.zeros(2, 12, dtype=torch.int64),
}


@pytest.mark.parametrize("message", WRONG_BATCHES)
def test_micro_batches_of_another_kind_are_refused_with_the_remedy(accelerator, message):
    model = GPT2(CONFIG).initialize(0)
    optimizer = build_adamw(model, learning_rate=1e-2)
    with pytest.raises(ValueError, match=f"^{message}"):
        step(accelerator, model, optimizer, WRONG_BATCHES[message])


def test_micro_batches_may_come_from_a_generator(accelerator):
    results, batch = [], cut(make_batch(4, ignored=[1, 2, 3, 4]), 2)
    for micro_batches in (batch, (part for part in batch)):
        model = GPT2(CONFIG).initialize(0)
        optimizer = build_adamw(model, learning_rate=1e-2)
        results.append(step(accelerator, model, optimizer, micro_batches))
    assert results[0] == results[1]


WRONG_OUTPUTS = {
    "a loss alone": lambda loss, count: loss,
    "one of one": lambda loss, count: (loss,),
    "a loss for each target": lambda loss, count: (loss.expand(3), count),
    "loss and logits": lambda loss, count: (loss, loss.expand(3)),
    "a dict of two": lambda loss, count: {"loss": loss, "count": count},
}


@pytest.mark.parametrize("kind", WRONG_OUTPUTS)
def test_a_model_that_returns_anything_else_is_refused(accelerator, kind):
    class Own(GPT2):
        def forward(self, input_ids, targets):
            return WRONG_OUTPUTS[kind](*super().forward(input_ids, targets))

    model = Own(CONFIG).initialize(0)
    optimizer = build_adamw(model, learning_rate=1e-2)
    with pytest.raises(ValueError, match=r"must return \(summed loss, number of targets\)"):
        step(accelerator, model, optimizer, [make_batch(2, ignored=[])])
