"""The smaller model, the plan of its runs, and the scaling of their rates."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain_lib import GPT2Config, LlamaConfig
from pretrain_lib.config.arguments import parse_recipe
from pretrain_lib.config.units import TokenCount
from pretrain_lib.tuning.proxy import (
    FEWEST_STEPS,
    RATES,
    Cost,
    as_flags,
    check_searchable,
    choose_tokens,
    common_settings,
    default_width,
    narrower,
    rates_of,
    trial_settings,
    without_flags,
)
from pretrain_lib.tuning.scaling import BASE, EMBEDDING, MATRIX, at_width
from pretrain_lib.tuning.search import Space, Trial, expected_trials
from tests.conftest import change

COST = Cost(tokens_per_second=10_000.0, seconds=5.0)


def shape(config):
    return dataclasses.asdict(config)


@pytest.mark.parametrize(
    ("model", "width"),
    [
        (GPT2Config(), 256),
        (GPT2Config(width=128, num_heads=4), 128),
        (LlamaConfig(), 256),
        (LlamaConfig(width=768, num_heads=12, num_key_value_heads=4, mlp_width=2048), 192),
        (LlamaConfig(width=4096, num_heads=32, num_key_value_heads=8, mlp_width=14336), 512),
    ],
)
def test_the_smaller_model_has_heads_as_wide_as_before(model, width):
    assert default_width(shape(model)) == width
    small = dataclasses.replace(model, **narrower(shape(model), width))
    assert small.width == width
    assert small.width / small.num_heads == model.width / model.num_heads
    if isinstance(model, LlamaConfig):
        assert small.num_heads / small.num_key_value_heads == (
            model.num_heads / model.num_key_value_heads
        )
        assert small.mlp_width / width == pytest.approx(model.mlp_width / model.width, rel=0.01)
    assert small.num_layers == model.num_layers


@pytest.mark.parametrize("width", [0, 100, 832])
def test_a_width_of_no_whole_heads_is_refused(width):
    with pytest.raises(ValueError, match="must be a multiple of 64.*nearest: "):
        narrower(shape(GPT2Config()), width)


@given(
    budget=st.floats(60, 1e6),
    speed=st.floats(100, 1e7),
    seconds=st.floats(0, 60),
    number=st.integers(1, 3),
)
def test_all_runs_fit_the_budget(budget, speed, seconds, number):
    settings = {"batch": {"tokens": 4096}, "schedule": {"tokens": 10**12}}
    cost, names = Cost(speed, seconds), ("a", "b", "c")[:number]
    try:
        tokens = choose_tokens(settings, names, cost, budget)
    except ValueError as error:
        assert "too short" in str(error)
        return
    space = Space((1.0,) * number, tokens)
    assert sum(map(cost.of, expected_trials(space))) <= budget
    assert tokens % (9 * 4096) == 0
    assert space.first_tokens >= FEWEST_STEPS * 4096


def test_no_run_is_longer_than_the_recipe():
    cost, shortest = Cost(tokens_per_second=1e9, seconds=0.0), FEWEST_STEPS * 9 * 4096
    for whole in (shortest, 10**7):
        settings = {"batch": {"tokens": 4096}, "schedule": {"tokens": whole}}
        tokens = choose_tokens(settings, ("a",), cost, 1e6)
        assert tokens <= whole < tokens + 9 * 4096
    settings["schedule"]["tokens"] = shortest - 1
    with pytest.raises(ValueError, match=f"tokens={shortest - 1} is too short for a search"):
        choose_tokens(settings, ("a",), cost, 1e6)


def test_the_flags_of_a_trial_are_those_of_the_recipe(recipe):
    recipe = change(
        recipe,
        schedule={"tokens": TokenCount(9000), "warmup_tokens": TokenCount(900)},
        batch={"tokens": 256},
        samples={"prompts": ["a"]},
    )
    settings, names = recipe.to_dict(), ("learning_rate",)
    given = common_settings(settings, 16) | trial_settings(settings, names, Trial((0.02,), 2560))
    config, _ = parse_recipe(recipe, arguments=as_flags(given))
    schedule = config.learning_rate()
    assert (schedule.peak, schedule.total_steps, schedule.warmup_steps) == (0.02, 10, 1)
    assert (config.model.width, config.model.num_heads) == (16, 1)
    assert config.samples.prompts == [] and config.validation.tokens == 512
    config.check(processes=1)


def test_rates_that_are_null_are_the_base_rate():
    settings = {"optimizer": {BASE: 6e-4, MATRIX: None, EMBEDDING: 2e-3}}
    assert rates_of(settings, RATES["muon"]) == (6e-4, 2e-3, 6e-4)


@pytest.mark.parametrize(
    ("section", "name", "value", "words"),
    [
        ("schedule", "tokens", None, "schedule.tokens"),
        ("data", "validation", "none", "hold out text"),
        ("batch", "ramp_from", 64, "--batch.ramp_from null"),
        ("optimizer", "learning_rate", 0.0, "optimizer.learning_rate=0"),
        ("run", "initial_weights", "gpt2", "run.initial_weights=gpt2: .*leave it out"),
        ("run", "resume", "runs/a", "run.resume=runs/a: .*leave it out"),
    ],
)
def test_what_short_runs_cannot_tell_is_refused(recipe, section, name, value, words):
    settings = recipe.to_dict()
    for resume in ("never", "auto"):
        settings["run"]["resume"] = resume
        check_searchable(settings)
    settings[section][name] = value
    with pytest.raises(ValueError, match=words):
        check_searchable(settings)


def update_norm(kind, width):
    """Return the spectral norm of an optimizer's first update of a width x 4 width matrix."""
    torch.manual_seed(0)
    left, right = torch.randn(width, 1), torch.randn(1, 4 * width)
    gradient = left @ right + 1e-3 * torch.randn(width, 4 * width)
    if kind == "adamw":
        return torch.linalg.matrix_norm(gradient.sign(), 2).item()
    u, _, v = torch.linalg.svd(gradient, full_matrices=False)
    return torch.linalg.matrix_norm(0.2 * (4 * width) ** 0.5 * u @ v, 2).item()


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_at_the_scaled_rate_updates_have_the_same_spectral_norm_at_every_width(kind):
    tuned = {BASE: 1e-3, MATRIX: 4e-3, EMBEDDING: 2e-2}
    norms = []
    for width in (64, 128, 256):
        rates = at_width(tuned, kind=kind, tuned=64, wanted=width)
        assert (rates[BASE], rates[EMBEDDING]) == (1e-3, 2e-2)
        norms.append(rates[MATRIX] * update_norm(kind, width))
    assert norms == pytest.approx([norms[0]] * 3, rel=0.05)


def test_a_rate_that_all_parameters_share_is_split_where_the_width_differs():
    tuned = {BASE: 4e-3, EMBEDDING: 8e-3}
    assert at_width(tuned, kind="adamw", tuned=64, wanted=64) == tuned
    assert at_width(tuned, kind="adamw", tuned=64, wanted=128) == tuned | {MATRIX: 2e-3}


def test_flags_that_the_result_replaces_are_left_out():
    flags = ["--a.b", "1", "--c.d=2", "--c.dd", "3", "--e.f", "-4", "--a.b=5"]
    assert without_flags(flags, {"a.b", "c.d"}) == ["--c.dd", "3", "--e.f", "-4"]
    assert without_flags(flags, {"e.f"}) == ["--a.b", "1", "--c.d=2", "--c.dd", "3", "--a.b=5"]


def test_what_would_change_a_trial_unseen_is_left_out(recipe):
    """A matrix rate of the recipe, a floor after the schedule, the checkpoint of the best score."""
    recipe = change(
        recipe,
        optimizer={"matrix_learning_rate": 3e-3},
        schedule={"tokens": TokenCount(9000), "continue_at_floor": TokenCount(9000)},
        checkpoint={"keep_best": "hellaswag/acc_norm"},
        scores={"tasks": ["hellaswag"]},
    )
    settings, names = recipe.to_dict(), RATES["adamw"]
    given = common_settings(settings, 16)
    given |= trial_settings(settings, names, Trial((0.02, 0.03), 2560))
    config, _ = parse_recipe(recipe, arguments=as_flags(given))
    config.check(processes=1)
    assert config.optimizer.matrix_learning_rate is None
    assert config.whole_run() == 10 and config.checkpoint.keep_best is None
