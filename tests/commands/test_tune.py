"""`pretrain tune`: real runs of a tiny model, interrupted and continued."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pretrain_lib.commands import launching
from pretrain_lib.commands.cli import main
from pretrain_lib.config.arguments import parse_recipe
from tests.conftest import ROOT, forked_launchers, run_python, tiny_flags
from tests.forks import forked_python

# The command with a search of seven runs, over the base rate alone.
SMALL = """
import sys
from pretrain_lib.commands import tune
from pretrain_lib.commands.cli import main
from pretrain_lib.tuning import proxy, search

search.CANDIDATES, search.ROUNDS, search.MOST_STEPS = 3, 2, 0
proxy.ROUNDS, proxy.FEWEST_STEPS = 2, 2
tune.RATES = {"adamw": ("learning_rate",)}
main(sys.argv[1:])
"""


def run(*arguments):
    """Run the command in this process; return its exit code."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code or 0


@pytest.fixture
def command(prepared, tmp_path):
    """The words of a small search, whose longest runs have 12 steps."""
    script = tmp_path / "tune.py"
    script.write_text(SMALL)
    flags = tiny_flags(prepared, tmp_path / "unused")
    flags[flags.index("--schedule.tokens") + 1] = str(12 * 256)
    out = ["--out", tmp_path / "search", "--budget", "1h", "--width", "16"]
    return [script, "tune", "gpt2_124m", *out, *flags, "--optimizer.learning_rate", "1e-2"]


def finished(folder):
    """Return the starts of each finished run below a folder, by name."""
    found = {}
    for path in folder.glob("runs/*/status.json"):
        if json.loads(path.read_text())["state"] == "done":
            manifest = json.loads(path.with_name("manifest.json").read_text())
            found[path.parent.name] = manifest["starts"]
    return found


def states(folder):
    return {json.loads(path.read_text())["state"] for path in folder.glob("runs/*/status.json")}


def wait_for(condition, process=None):
    deadline = time.monotonic() + 600
    while not condition():
        assert process is None or process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_search_that_is_interrupted_runs_nothing_twice(command, tmp_path):
    command = [*command, "--run.resume", "never"]  # which the runs of a search leave aside
    folder, environment = tmp_path / "search", {**os.environ, **forked_launchers()}
    words = [sys.executable, *map(str, command)]
    stopped = subprocess.Popen(words, env=environment, cwd=ROOT, stdout=subprocess.PIPE)
    wait_for(lambda: finished(folder) and "running" in states(folder), stopped)
    stopped.send_signal(signal.SIGTERM)
    assert "stopped: the same command goes on" in stopped.communicate()[0].decode()
    assert stopped.returncode == 75
    first = finished(folder)
    assert first and all(len(starts) == 1 for starts in first.values())
    wait_for(lambda: "running" not in states(folder))  # the run itself still saves

    with Path("/dev/full").open("w") as full:  # a log that cannot grow
        streams = {"stdout": full, "stderr": full}
        killed = subprocess.Popen(words, cwd=ROOT, start_new_session=True, **streams)
    wait_for(lambda: "running" in states(folder), killed)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    second = finished(folder)

    result = run_python(*command, environment=forked_launchers())
    assert result.returncode == 0, result.stderr
    third = finished(folder)
    assert all(third[name] == starts for name, starts in (first | second).items())
    assert len(third) in (6, 7)
    assert not list(folder.glob("runs/*/checkpoints/step-*"))
    check_result(folder, result.stdout)


def check_result(folder, shown):
    """The best of the longest runs is shown, and the last line trains with its rate."""
    result = json.loads((folder / "result.json").read_text())
    longest = [trial for trial in result["trials"] if trial["tokens"] == 12 * 256]
    best = min(longest, key=lambda trial: trial["loss"])
    assert result["at_width"]["16"] == {"learning_rate": best["rates"][0]}
    assert f"{best['loss']:.4f}" in shown
    assert (folder / "tune.png").read_bytes().startswith(b"\x89PNG")
    words = shlex.split(shown.splitlines()[-1])
    assert words[:3] == ["pretrain", "train", "gpt2_124m"]
    sys.path.insert(0, str(ROOT / "recipes"))
    import gpt2_124m

    config, _ = parse_recipe(gpt2_124m.RECIPE, arguments=words[3:])
    assert config.optimizer.learning_rate == pytest.approx(best["rates"][0], rel=1e-2)
    assert config.optimizer.matrix_learning_rate == pytest.approx(best["rates"][0] / 2, rel=1e-2)
    assert re.search(r"\d+/7 .* left", shown)


@pytest.mark.slow
def test_a_budget_that_is_too_short_leaves_nothing_that_a_longer_one_meets(command, tmp_path):
    before = {path.name for path in tmp_path.iterdir()}
    command[command.index("--budget") + 1] = "1s"
    result = run_python(*command, environment=forked_launchers())
    assert result.returncode == 2
    # A slow machine does not even measure a speed in it.
    told = r"error: --budget 1s is too short (for 7 runs, .* give \d+m|to measure 2 steps in: give)"
    assert re.search(told, result.stderr)
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.slow
def test_a_search_whose_overlay_was_edited_is_refused(command, tmp_path):
    overlay, plan = tmp_path / "mine.yaml", tmp_path / "search" / "plan.json"
    overlay.write_text("optimizer: {weight_decay: 0.1}")
    words = [*command, "--config", overlay]
    running = subprocess.Popen(
        [sys.executable, *map(str, words)], env={**os.environ, **forked_launchers()}, cwd=ROOT
    )
    wait_for(plan.is_file, running)
    running.send_signal(signal.SIGTERM)
    assert running.wait() == 75
    overlay.write_text("optimizer: {weight_decay: 0.7}")
    before = plan.read_bytes(), finished(tmp_path / "search")
    result = run_python(*words, environment=forked_launchers())
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "optimizer.weight_decay was 0.1, is 0.7" in result.stderr
    assert (plan.read_bytes(), finished(tmp_path / "search")) == before


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["gpt2_124"], "did you mean gpt2_124m?"),
        (["gpt2_124m", "--budget", "soon"], "--budget soon must be a time"),
        (["gpt2_124m", "--width", "100"], "--width 100 must be a multiple of 64"),
        (["gpt2_124m", "--data.validation", "none"], "hold out text"),
        (["gpt2_124m", "--run.resume", "runs/a"], "run.resume=runs/a: the search trains"),
        (["gpt2_124m", "--run.initial_weights", "gpt2"], "run.initial_weights=gpt2: the search"),
        (["gpt2_124m", "--batch.tokens", "1.5"], "--batch.tokens 1.5 must be"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_is_written(
    arguments, named, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(launching, "sys", SimpleNamespace(executable=forked_python()))
    assert run("tune", *arguments, "--out", tmp_path / "out") == 2
    shown = capsys.readouterr().err
    assert named in shown and shown.count("\n") == 1
    assert not (tmp_path / "out").exists()
