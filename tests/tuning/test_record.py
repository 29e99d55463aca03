"""What is read of the runs of a search, and the plan that a second start must match."""

import json
import math
import re
import subprocess
import sys
from threading import Timer

import pytest

from pretrain_lib.tuning.record import (
    await_run,
    drop_checkpoints,
    read_loss,
    read_plan,
    write_result,
)
from pretrain_lib.tuning.search import Trial


def write_run(folder, state, *losses, reason=""):
    folder.mkdir()
    (folder / "status.json").write_text(json.dumps({"state": state, "reason": reason}))
    rows = [{"kind": "validation", "step": n, "tokens": n, "loss": x} for n, x in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("state", "reason", "loss"),
    [
        ("done", "", 4.5),
        ("running", "", None),
        ("resumable", "signal SIGTERM", None),
        ("failed", "FloatingPointError: 10 updates in a row were left out", math.inf),
        ("failed", "OutOfMemoryError: CUDA out of memory", None),
    ],
)
def test_the_loss_of_a_run_is_that_at_its_end(tmp_path, state, reason, loss):
    assert read_loss(write_run(tmp_path / "run", state, 9.0, 4.5, reason=reason)) == loss


def test_a_run_that_is_not_there_has_no_loss(tmp_path):
    assert read_loss(tmp_path / "run") is None


def test_a_run_that_ended_without_a_number_diverged(tmp_path):
    assert read_loss(write_run(tmp_path / "run", "done", 9.0, None)) == math.inf


def test_a_run_that_is_still_going_on_is_waited_for(tmp_path):
    await_run(tmp_path)  # without a run nobody waits
    code = "import sys, time, fcntl; f = open(sys.argv[1], 'ab'); fcntl.flock(f, fcntl.LOCK_EX);"
    code += "print('locked', flush=True); sys.stdin.read(); open(sys.argv[1] + '-end', 'w')"
    command = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == b"locked\n"
        Timer(0.2, other.stdin.close).start()
        await_run(tmp_path)
        assert (tmp_path / ".lock-end").exists()


def test_only_checkpoints_are_dropped(tmp_path):
    folder = write_run(tmp_path / "run", "done", 9.0)
    for name in ("step-00000003", "step-mine", "notes"):
        (folder / "checkpoints" / name).mkdir(parents=True)
    drop_checkpoints(folder)
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"step-mine", "notes"}
    assert read_loss(folder) == 9.0


def test_a_folder_holds_one_search(tmp_path):
    flags = ["--batch.tokens", "512", "--data.path=mine", "--run.seed", "1"]
    plan = {"recipe": "gpt2_124m", "flags": flags, "width": 128, "budget": 60.0}
    assert read_plan(tmp_path, plan) == plan
    assert not any(tmp_path.iterdir())
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"tokens": 9}))
    assert read_plan(tmp_path, plan) == plan | {"tokens": 9}
    same = ["--data.path", "mine", *flags[:2], *flags[3:]]
    assert read_plan(tmp_path, plan | {"flags": same})["tokens"] == 9


@pytest.mark.parametrize(
    ("changed", "there", "given"),
    [
        ({"width": 256}, "--width 128", "256"),
        ({"budget": 1260.0}, "--budget 1m", "21m"),
        ({"recipe": "mine.py"}, "RECIPE gpt2_124m", "mine.py"),
        ({"flags": ["--a", "1", "--b", "3"]}, "--b 2", "3"),
        ({"flags": ["--a", "1"], "width": 2}, "--b 2, --width 128", "no --b, 2"),
        ({"flags": ["--a", "1", "--b=2", "--c", "[x]"]}, "no --c", "'[x]'"),
    ],
)
def test_another_search_is_refused_by_what_differs(tmp_path, changed, there, given):
    flags = ["--a", "1", "--b", "2"]
    plan = {"recipe": "gpt2_124m", "flags": flags, "width": 128, "budget": 60.0}
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"tokens": 9}))
    with pytest.raises(ValueError, match="holds a search with ") as refused:
        read_plan(tmp_path, plan | changed)
    assert f"{tmp_path} holds a search with {there}, not {given}: give" in str(refused.value)


def test_a_search_goes_on_with_the_settings_that_decide_its_losses(recipe, tmp_path):
    plan = {"recipe": "mine.py", "flags": [], "width": 16, "budget": 60.0}
    asked = plan | {"settings": json.loads(json.dumps(recipe.to_dict()))}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(asked | {"tokens": 9}))
    for section, name, is_decisive in (
        ("optimizer", "weight_decay", True),
        ("model", "num_layers", True),
        ("schedule", "warmup_tokens", True),
        ("data", "path", True),
        ("validation", "tokens", True),
        ("run", "seed", True),
        ("run", "dir", False),
        ("log", "trackers", False),
        ("system", "compile", False),
        ("data", "workers", False),
    ):
        old = asked["settings"][section][name]
        settings = asked["settings"] | {section: asked["settings"][section] | {name: 7}}
        if not is_decisive:
            assert read_plan(tmp_path, asked | {"settings": settings})["tokens"] == 9
            continue
        told = f"{tmp_path} was begun with other settings ({section}.{name} was {old}, is 7); set"
        with pytest.raises(ValueError, match=re.escape(told)):
            read_plan(tmp_path, asked | {"settings": settings})
    path.write_text(json.dumps(plan | {"tokens": 9}))  # as earlier versions wrote it
    assert read_plan(tmp_path, asked)["tokens"] == 9


def test_the_result_is_json_without_infinities(tmp_path):
    losses = {Trial((0.1,), 9): 4.0, Trial((0.8,), 9): math.inf}
    write_result(tmp_path, ("learning_rate",), losses, loss=4.0)
    text = (tmp_path / "result.json").read_text()
    result = json.loads(text, parse_constant=pytest.fail)
    assert [trial["loss"] for trial in result["trials"]] == [4.0, None]
    assert result["trials"][0]["rates"] == [0.1]
