"""A flag that nothing reads is refused by name; defaults, overlays and recipes are left alone."""

import numpy as np
import pytest
import yaml

from pretrain_lib import prepare
from pretrain_lib.config.arguments import parse_recipe
from pretrain_lib.data.prepare.job import Job
from tests.conftest import change


@pytest.fixture
def published(recipe):
    """A recipe that holds out text of its own in its own way."""
    data = {"source": "owner/text", "tokenizer": "gpt2", "validation": "first:1e6"}
    return change(recipe, data=data | {"path": None})


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """A folder whose first 500 tokens are held out."""
    folder = tmp_path_factory.mktemp("held_out")
    (folder / "text.txt").write_text("def add(one, two):\n    return one + two\n" * 200)
    job = Job((str(folder / "text.txt"),), train_tokenizer=300, validation="first:500")
    prepare(job, folder / "data", quiet=True)
    return folder / "data"


def refusal(recipe, *flags):
    with pytest.raises(ValueError, match="leave it out") as refused:
        parse_recipe(recipe, arguments=[str(flag) for flag in flags])
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("flag", "value", "reason"),
    [
        ("validation", "first:400", "was prepared with first:500"),
        ("validation", "hash", "was prepared with first:500"),
        ("train_tokenizer", "4096", "holds tokens already"),
        ("text_field", "nope", "holds tokens already"),
        ("document_separator", "X", "holds tokens already"),
        ("dtype", "uint32", "says of which type its ids are"),
    ],
)
def test_what_a_prepared_folder_has_decided_is_no_flag(published, held_out, flag, value, reason):
    said = refusal(published, "--data.path", held_out, f"--data.{flag}", value)
    assert said.startswith(f"--data.{flag} {value} is not read: data.path={held_out} {reason}")


@pytest.mark.parametrize(
    ("flag", "value", "decider", "remedy"),
    [
        ("optimizer.momentum", "0.9", "optimizer.kind=adamw", "muon"),
        ("schedule.decay_tokens", "256", "schedule.kind=cosine", "wsd"),
        ("schedule.decay_shape", "cosine", "schedule.kind=cosine", "wsd"),
        ("stability.spike_action", "rollback", "stability.spike_sigma=null", "a number such as 6"),
        ("stability.spike_window", "64", "stability.spike_sigma=null", "a number such as 6"),
        ("data.spool_tokens", "4096", "data.streaming=false", "true"),
        ("data.train_tokenizer", "4096", "data.tokenizer=x", "null"),
    ],
)
def test_a_flag_that_another_setting_puts_out_of_use(recipe, flag, value, decider, remedy):
    more = ["--data.tokenizer", "x"] if "tokenizer" in flag else []
    said = refusal(recipe, f"--{flag}", value, *more)
    name = decider.partition("=")[0]
    assert said.startswith(f"--{flag} {value} has no effect with {decider}; leave it out, or set")
    assert said.endswith(f"set {name} to {remedy}")


def test_a_constant_rate_has_no_final_fraction(recipe):
    flags = ["--schedule.kind", "constant", "--schedule.final_fraction", "0"]
    assert "has no effect with schedule.kind=constant" in refusal(recipe, *flags)


def test_what_has_an_effect_or_is_a_default_is_taken(published, held_out, tmp_path):
    array = tmp_path / "ids.npy"
    np.save(array, np.zeros(5000, np.uint16))
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("data: {text_field: content}\nschedule: {decay_tokens: 256}")
    there = ["--data.path", held_out]
    for flags in (
        there,  # the recipe's own first:1e6 is of its own text
        [*there, "--data.validation", "first:500.0"],
        [*there, "--data.validation", "none"],
        [*there, "--data.validation", array, "--data.dtype", "uint16"],
        [*there, "--config", overlay, "--optimizer.momentum", "0.95", "--data.dtype", "null"],
        [*there, "--optimizer.kind", "muon", "--optimizer.momentum", "0.9"],
        [*there, "--schedule.kind", "wsd", "--schedule.decay_shape", "cosine"],
        [*there, "--stability.spike_sigma", "6", "--stability.spike_action", "rollback"],
        ["--data.source", "mine", "--data.text_field", "content", "--data.validation", "none"],
        ["--data.train_tokenizer", "4096"],
    ):
        parse_recipe(published, arguments=[str(flag) for flag in flags])


def test_the_settings_of_a_run_are_an_overlay(published, held_out, tmp_path):
    flags = ["--data.path", str(held_out), "--schedule.kind", "constant"]
    config, _ = parse_recipe(published, arguments=flags)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.to_dict()))
    assert parse_recipe(published, arguments=["--config", str(file)])[0] == config


def test_steps_to_profile_lie_in_the_run(recipe):
    profiled = change(recipe, system={"profile": (8, 20)})
    profiled.check(processes=1)
    change(profiled, run={"max_steps": 0}).check(processes=1)
    with pytest.raises(ValueError, match=r"profile=\[8, 20\]: the run ends at step 7, .*null"):
        change(profiled, run={"max_steps": 7}).check(processes=1)
