"""Settings that had another name: refused wherever they are given, with the new name."""

import re

import pytest

from pretrain_lib.config.arguments import parse_recipe
from pretrain_lib.config.renamed import ELSEWHERE, RENAMED, with_new_names
from tests.conftest import ROOT, change

# What each was called, and a value that it took.
BEFORE = {
    "save_every": ("5000", "checkpoint.every"),
    "save_every_tokens": ("1e9", "checkpoint.every_tokens"),
    "keep_last": ("5", "checkpoint.keep_last"),
    "keep_every": ("5000", "checkpoint.keep_every"),
    "log_every": ("10", "log.every"),
    "trackers": ("[tensorboard]", "log.trackers"),
    "evaluate_every": ("250", "validation.every"),
    "evaluate_tokens": ("1e6", "validation.tokens"),
    "max_skipped": ("5", "stability.max_skipped"),
    "spike_sigma": ("6", "stability.spike_sigma"),
    "spike_window": ("64", "stability.spike_window"),
    "spike_action": ("rollback", "stability.spike_action"),
    "processes": ("1", "system.processes"),
    "compile": ("false", "system.compile"),
    "recompute": ("full", "system.activation_checkpointing"),
    "gather": ("bf16", "system.fsdp_param_dtype"),
    "collective_timeout": ("20m", "system.collective_timeout"),
}


def test_every_old_name_is_tested():
    assert RENAMED.keys() == {f"run.{name}" for name in BEFORE}


@pytest.mark.parametrize("old", BEFORE)
def test_an_old_name_is_refused_and_the_new_one_taken(recipe, tmp_path, old):
    value, new = BEFORE[old]
    overlay = tmp_path / "old.yaml"
    overlay.write_text(f"run: {{{old}: {value}}}")
    for arguments, expected in (
        ([f"--run.{old}", value], f"--run.{old} is now called --{new}"),
        ([f"--run.{old}={value}"], f"--run.{old} is now called --{new}"),
        (["--config", str(overlay)], f"{overlay}: run.{old} is now called {new}"),
        (["--run.allow_changes", f"[run.{old}]"], f"run.{old} is now called {new}"),
    ):
        with pytest.raises(ValueError, match=re.escape(expected)):
            parse_recipe(recipe, arguments=arguments)
    section, _, field = new.partition(".")
    if field in ("spike_window", "spike_action"):  # of no effect without it
        recipe = change(recipe, stability={"spike_sigma": 6.0})
    taken = [
        getattr(getattr(parse_recipe(recipe, arguments=flags)[0], section), field)
        for flags in ([], [f"--{new}", value])
    ]
    assert taken[0] != taken[1]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_others_call_a_setting_is_told_as_the_documentation_does(recipe, tmp_path, name):
    setting = ELSEWHERE[name]
    rows = (ROOT / "docs" / "migrating.md").read_text().splitlines()
    assert [row for row in rows if re.search(rf"\b{name}\b", row) and setting in row]
    for flag in (f"--{name}", f"--optimizer.{name}"):
        with pytest.raises(ValueError, match=f"no flag {flag}; .* here is --{setting} "):
            parse_recipe(recipe, arguments=[flag, "1"])
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(f"optimizer: {{{name}: 1}}")
    with pytest.raises(ValueError, match=f"{name} is no setting; .* here is {setting} "):
        parse_recipe(recipe, arguments=["--config", str(overlay)])


@pytest.mark.parametrize(
    ("written", "near"),
    [
        ("optimizer.learnin_rate", "; did you mean --optimizer.learning_rate?"),
        ("optimiser.learning_rate", "; did you mean --optimizer.learning_rate?"),
        ("model.weight_decay", "; did you mean --optimizer.weight_decay?"),
        ("learning_rate", "; did you mean --optimizer.learning_rate?"),
        ("shedule.tokens", "; did you mean --schedule.tokens?"),
        ("confg", "; did you mean --config?"),
        ("optimizer.nesterov", ""),
        ("optimizer.xyz", ""),
    ],
)
def test_only_a_setting_that_is_near_is_suggested(recipe, written, near):
    with pytest.raises(ValueError, match="there is no flag") as refused:
        parse_recipe(recipe, arguments=[f"--{written}", "1"])
    assert str(refused.value) == f"there is no flag --{written}{near} (--help lists all flags)"


def test_settings_of_before_are_read_under_their_new_names():
    stored = {"run": {"dir": "runs/x", "save_every": 5, "gather": "fp32"}, "batch": {"tokens": 8}}
    assert with_new_names(stored) == {
        "run": {"dir": "runs/x"},
        "checkpoint": {"every": 5},
        "system": {"fsdp_param_dtype": "fp32"},
        "batch": {"tokens": 8},
    }


def test_a_setting_that_was_added_later_has_the_value_of_what_was_done_before():
    now = {"data": {"packing": "concat", "shuffle": "documents"}, "model": {"width": 8}}
    before = with_new_names({"data": {"packing": "concat"}, "model": {"width": 8}}, now=now)
    assert before == {"data": {"packing": "concat", "shuffle": "windows"}, "model": {"width": 8}}
    assert with_new_names(now, now=now) == now
