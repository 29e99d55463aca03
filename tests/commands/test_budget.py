"""`pretrain train --budget`: a schedule that this machine trains in a given time."""

import json
import re

import pytest
import yaml

from pretrain_lib.commands.budget import tokens_within
from tests.conftest import forked_launchers, read_rows, run_pretrain, tiny_flags

SETTINGS = {
    "batch": {"tokens": 1000},
    "validation": {"every": 10, "tokens": 30_000},
    "data": {"validation": "hash"},
}


def seconds(tokens, speed):
    """What a run takes by hand: its steps, and a third of a step's time for each token validated.

    Validations come at the start, every ten steps, and at the end.
    """
    validations = 2 + tokens / 1000 / 10
    return tokens / speed + validations * 10_000 / speed


@pytest.mark.parametrize("speed", [500.0, 5e3, 1e6])
def test_a_budget_is_filled_to_nine_tenths(speed):
    budget = 200_000 / speed
    tokens = tokens_within(SETTINGS, speed, budget)
    assert tokens % 1000 == 0
    assert seconds(tokens, speed) <= 0.9 * budget < seconds(tokens + 1000, speed)
    without = SETTINGS | {"data": {"validation": "none"}}
    assert tokens_within(without, speed, budget) == 180_000


def test_a_budget_for_hardly_a_step_names_the_one_that_would_do():
    with pytest.raises(ValueError, match=r"budget=10s is too short .* give [\d.]+m") as error:
        tokens_within(SETTINGS, 500.0, 10)
    enough = 60 * float(re.search(r"give ([\d.]+)m", str(error.value))[1])
    assert tokens_within(SETTINGS, 500.0, enough + 3) >= 32_000


def train(*flags):
    return run_pretrain("train", "gpt2_124m", *flags, environment=forked_launchers())


def schedule(run):
    return yaml.safe_load((run / "config.yaml").read_text())["schedule"]


@pytest.mark.slow
def test_a_run_is_as_long_as_the_budget_allows_and_keeps_it_on_resume(prepared, tmp_path):
    run = tmp_path / "run"
    flags = tiny_flags(prepared, run)
    flags[flags.index("--schedule.tokens") + 1] = "1e9"
    flags += ["--schedule.warmup_tokens", "1e8", "--log.every", "1000"]
    first = train("--budget", "8s", *flags, "--run.max_steps", "40", "--checkpoint.every", "40")
    assert first.returncode == 0, first.stderr
    tokens = schedule(run)["tokens"]
    assert "of the schedule's 1B tokens" in first.stdout
    assert 32 * 256 <= tokens < 10**8 and tokens % 256 == 0
    assert schedule(run)["warmup_tokens"] == pytest.approx(tokens / 10, abs=256)
    second = train("--budget", "8s", *flags, "--run.max_steps", "80")
    assert second.returncode == 0, second.stderr
    assert "measuring" not in second.stdout and schedule(run)["tokens"] == tokens
    assert json.loads((run / "status.json").read_text())["step"] == 80
    assert [row["step"] for row in read_rows(run) if row["kind"] == "validation"][-1] == 80
    assert {path.name for path in tmp_path.iterdir()} == {"run"}  # nothing of what was measured


@pytest.mark.slow
def test_a_budget_for_more_than_the_schedule_changes_nothing(prepared, tmp_path):
    flags = tiny_flags(prepared, tmp_path / "run")
    result = train("--budget", "1h", *flags)
    assert result.returncode == 0, result.stderr
    assert "1h00m are enough for all" in result.stdout
    whole = flags[flags.index("--schedule.tokens") + 1]
    assert schedule(tmp_path / "run")["tokens"] == int(float(whole))


@pytest.mark.slow
def test_what_cannot_be_measured_is_refused_in_one_line(prepared, tmp_path):
    flags = tiny_flags(prepared, tmp_path / "run")
    epochs = [*flags, "--schedule.tokens", "null", "--schedule.epochs", "2"]
    for given, named in ((epochs, "give schedule.tokens"), ([*flags, "--log.every", "0"], "every")):
        result = train("--budget", "1m", *given)
        assert result.returncode == 2 and named in result.stderr
        assert result.stderr.count("\n") == 1 and not (tmp_path / "run").exists()
