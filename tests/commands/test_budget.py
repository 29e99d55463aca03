"""`pretrain train --budget`: a schedule that this machine trains in a given time."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from pretrain_lib.commands import launching
from pretrain_lib.commands.budget import START_SECONDS, measure_steps, tokens_within
from pretrain_lib.tuning.proxy import shorter_schedule
from pretrain_lib.tuning.record import Measured
from tests.conftest import ROOT, fill, forked_launchers, read_rows, run_pretrain, tiny_flags
from tests.forks import forked_python

SETTINGS = {
    "batch": {"tokens": 1000},
    "schedule": {"tokens": 10**9, "continue_at_floor": None},
    "validation": {"every": 10, "tokens": None},
}


def measured(speed, validated=30_000):
    return Measured(tokens_per_second=speed, seconds=1.0, validated=validated)


def seconds(tokens, speed):
    """What a run takes by hand: its steps, and a third of a step's time for each token validated.

    Validations come at the start, every ten steps, and at the end.
    """
    validations = 2 + tokens / 1000 / 10
    return tokens / speed + validations * 10_000 / speed


@pytest.mark.parametrize("speed", [500.0, 5e3, 1e6])
def test_a_budget_is_filled_to_nine_tenths(speed):
    budget = 200_000 / speed
    tokens = tokens_within(SETTINGS, measured(speed), budget)
    assert tokens % 1000 == 0
    assert seconds(tokens, speed) <= 0.9 * budget < seconds(tokens + 1000, speed)
    assert tokens_within(SETTINGS, measured(speed, validated=0), budget) == 180_000


def test_what_is_trained_at_the_floor_counts():
    schedule = {"tokens": 10**9, "continue_at_floor": 10**9 // 2}
    settings = SETTINGS | {"schedule": schedule}
    assert tokens_within(settings, measured(1000.0, validated=0), 200) == 120_000
    own = {"kind": "wsd", "warmup_fraction": 0.1, "warmup_tokens": None, "decay_fraction": 0.5}
    settings |= {"schedule": schedule | own}
    shorter = shorter_schedule(settings, 120_000)
    assert shorter["schedule.continue_at_floor"] == 60_000
    assert shorter["schedule.decay_tokens"] == 60_000
    settings["schedule"] = schedule | own | {"continue_at_floor": 10**9 // 200}
    assert shorter_schedule(settings, 120_000)["schedule.continue_at_floor"] is None  # no step


def test_a_budget_for_hardly_a_step_names_the_one_that_would_do():
    with pytest.raises(ValueError, match=r"budget=10s is too short .* give [\d.]+m") as error:
        tokens_within(SETTINGS, measured(500.0), 10)
    enough = 60 * float(re.search(r"give ([\d.]+)m", str(error.value))[1])
    assert tokens_within(SETTINGS, measured(500.0), enough + 3) >= 32_000


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
    first = train("--budget", "1m", *flags, "--run.max_steps", "40", "--checkpoint.every", "40")
    assert first.returncode == 0, first.stderr
    tokens = schedule(run)["tokens"]
    assert "of the schedule's 1B tokens" in first.stdout
    assert 32 * 256 <= tokens < 10**8 and tokens % 256 == 0
    assert schedule(run)["warmup_tokens"] == pytest.approx(tokens / 10, abs=256)
    second = train("--budget", "1m", *flags, "--run.max_steps", "80")
    assert second.returncode == 0, second.stderr
    assert "goes on with the schedule that it began with" in second.stdout
    assert "measuring" not in second.stdout and schedule(run)["tokens"] == tokens
    assert json.loads((run / "status.json").read_text())["step"] == 80
    assert [row["step"] for row in read_rows(run) if row["kind"] == "validation"][-1] == 80
    assert {path.name for path in tmp_path.iterdir()} == {"run"}  # nothing of what was measured


@pytest.mark.slow
def test_a_budget_for_more_than_the_schedule_changes_nothing(prepared, tmp_path):
    flags = tiny_flags(prepared, tmp_path / "run")
    assert "at most 32 steps" in train("--budget", "1h", *flags, "--run.max_steps", "1").stdout
    flags[flags.index("--schedule.tokens") + 1] = "16000"
    flags[flags.index("--run.dir") + 1] = str(tmp_path / "other")
    result = train("--budget", "1h", *flags)
    assert result.returncode == 0, result.stderr
    assert "1h00m are enough for all" in result.stdout
    whole = flags[flags.index("--schedule.tokens") + 1]
    assert schedule(tmp_path / "other")["tokens"] == int(whole)


REFUSED = {
    "as schedule.tokens, in proportion": ["--schedule.tokens", "null", "--schedule.epochs", "2"],
    "a ramp of the batch does not": [
        *("--batch.ramp_from", "128", "--batch.ramp_increment", "128"),
        *("--batch.ramp_tokens", "2048"),
    ],
    "log.every": ["--log.every", "0"],
    "has a schedule of which a part is done": ["--run.resume", "other/run"],
    "neither empty nor a run folder": ["--run.dir", "{mine}"],
    "--budget is for training: leave it out with --plan": ["--plan"],
    "data.path={mine} holds no manifest.json": ["--data.path", "{mine}"],
}


@pytest.mark.slow
@pytest.mark.parametrize("named", REFUSED)
def test_what_cannot_be_measured_is_refused_before_anything_is_written(prepared, tmp_path, named):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("mine")
    more = [flag.format(mine=mine) for flag in REFUSED[named]]
    result = train("--budget", "1m", *tiny_flags(prepared, tmp_path / "run"), *more)
    assert result.returncode == 2 and named.format(mine=mine) in result.stderr
    assert len([x for x in result.stderr.splitlines() if "frozen runpy" not in x]) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"mine"}


@pytest.mark.slow
def test_a_run_that_keeps_its_best_score_is_measured_without_scores(prepared, tmp_path):
    """Its settings hold together without the tasks that the measurement leaves out."""
    tasks = ["--scores.tasks", "[hellaswag]", "--checkpoint.keep_best", "hellaswag/acc_norm"]
    flags = [*tiny_flags(prepared, tmp_path / "run"), "--schedule.tokens", "1e6"]
    result = train("--budget", "20s", *flags, *tasks)
    assert "tokens a second: 20s are enough for" in result.stdout, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("room", [2**13, 2**15])  # for less than the metrics, than a checkpoint
def test_a_measurement_on_a_full_disk_says_so_and_keeps_its_log(prepared, disk, room):
    filler = fill(disk)
    os.truncate(filler, filler.stat().st_size - room)
    flags = [*tiny_flags(prepared, disk / "run"), "--schedule.tokens", "1e6"]
    result = train("--budget", "20s", *flags)
    lines = [line for line in result.stderr.splitlines() if "frozen runpy" not in line]
    assert result.returncode == 2 and len(lines) == 1
    named = re.fullmatch(r"error: a run stopped, see (\S+\.log): (.*)", lines[0])
    assert "No space left" in named[2] or "could not be written: make room" in named[2]
    assert re.search("No space left|could not be written", Path(named[1]).read_text())
    Path(named[1]).unlink()
    assert {path.name for path in disk.iterdir()} == {"filler"}


@pytest.mark.slow
def test_a_measurement_takes_hardly_longer_than_the_budget(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(launching, "sys", SimpleNamespace(executable=forked_python()))
    config = ROOT / "accelerate_configs" / "cpu.yaml"
    words = ["--quiet", "--config_file", str(config), str(ROOT / "recipes" / "gpt2_124m.py")]
    words += [str(flag) for flag in tiny_flags(prepared, tmp_path / "unused")]
    words += ["--run.resume", "never"]  # which is said of the user's own folder
    with pytest.raises(ValueError, match="too short to measure 2 steps in"):
        measure_steps(tmp_path / "log", words, tmp_path / "run", 0.1 - START_SECONDS)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "resumable"
