"""Checkpoints written beside training, and disks that are full."""

import errno
import json
import pickle
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from pretrain_lib import GPT2, build_adamw, find_newest, load_checkpoint, verify_checkpoint
from pretrain_lib.checkpoint import folders as checkpoint_folders
from pretrain_lib.checkpoint.parts import checkpoint_bytes, moments_file
from pretrain_lib.checkpoint.state import TrainingState
from pretrain_lib.checkpoint.writer import CheckpointWriter
from pretrain_lib.training.step import accumulate_gradients, apply_update
from tests.checkpoint.test_checkpoint import GPT2_SHAPE, batch, save, steps
from tests.conftest import ROOT, change, read_rows, run_command, run_python
from tests.training.test_loop import run, status


@pytest.fixture
def model():
    return GPT2(GPT2_SHAPE).initialize(0)


def writer(folder, model):
    return CheckpointWriter(folder, model, tokenizer=None, manifest={"parent": None})


def moments_of(model, optimizer):
    return {
        f"{name}.{kind}": tensor.clone()
        for name, parameter in model.named_parameters()
        for kind, tensor in optimizer.state[parameter].items()
    }


def test_what_is_written_is_the_state_at_the_start_whatever_runs_meanwhile(model, tmp_path):
    optimizer = build_adamw(model, learning_rate=1e-2)
    steps(model, optimizer, range(3))
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = moments_of(model, optimizer)
    state, accelerator = TrainingState(step=3, windows=6), Accelerator(cpu=True)
    background = writer(tmp_path, model)
    background.start(state, model, optimizer)
    state.step = 4  # the loop goes on with its own
    accumulated = accumulate_gradients(accelerator, model, batch(3), seed=0, step=3)
    saved = background.wait()
    apply_update(accelerator, model, optimizer, accumulated, learning_rate=1e-2, max_grad_norm=1.0)
    assert (saved.step, saved.error, saved.path) == (3, None, tmp_path / "step-00000003")
    assert verify_checkpoint(saved.path) == []
    again = GPT2(GPT2_SHAPE)
    load_checkpoint(saved.path, again, build_adamw(again, learning_rate=1e-2))
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    written = load_file(saved.path / moments_file(0, 1))
    assert written.keys() == moments.keys()
    assert all(torch.equal(written[name], moments[name]) for name in moments)
    assert background.wait() is None  # told once


def test_a_resumed_run_writes_the_same_bytes(model, tmp_path):
    optimizer = build_adamw(model, learning_rate=1e-2)
    steps(model, optimizer, range(3))
    path = save(tmp_path / "one", 3, model, optimizer)
    again = GPT2(GPT2_SHAPE)
    fresh = build_adamw(again, learning_rate=1e-2)
    load_checkpoint(path, again, fresh)
    for parameter in again.parameters():  # as another process may have built it
        fresh.state[parameter] = dict(reversed(fresh.state[parameter].items()))
    other = save(tmp_path / "two", 3, again, fresh)
    for file in ("model.safetensors", moments_file(0, 1)):
        assert (path / file).read_bytes() == (other / file).read_bytes()


def test_some_are_kept_for_ever(model, tmp_path):
    optimizer = build_adamw(model, learning_rate=1e-2)
    steps(model, optimizer, range(1))
    for step in range(1, 12):
        save(tmp_path, step, model, optimizer, keep_last=2, keep_every=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"step-{step:08d}" for step in (4, 8, 10, 11)
    ]


def test_a_defect_in_the_writer_is_raised_where_it_is_waited_for(model, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyError("a defect")

    monkeypatch.setattr("pretrain_lib.checkpoint.writer.write_checkpoint", fail)
    background = writer(tmp_path, model)
    background.start(TrainingState(step=1), model, build_adamw(model, learning_rate=1e-2))
    with pytest.raises(KeyError, match="a defect"):
        background.wait()


def test_too_little_room_is_said_before_anything_is_written(model, tmp_path, monkeypatch):
    optimizer = build_adamw(model, learning_rate=1e-2)
    steps(model, optimizer, range(1))
    older = save(tmp_path, 1, model, optimizer)
    room = checkpoint_bytes(model, optimizer) - 1
    usage = type("Usage", (), {"free": room})
    monkeypatch.setattr(checkpoint_folders.shutil, "disk_usage", lambda _: usage)
    background = writer(tmp_path, model)
    background.start(TrainingState(step=2), model, optimizer)
    saved = background.wait()
    assert saved.path is None
    assert saved.error.errno == errno.ENOSPC
    message = "are free: make room, or keep fewer checkpoints (checkpoint.keep_last)"
    assert message in str(saved.error)
    assert [path.name for path in tmp_path.iterdir()] == [older.name]


def test_what_a_killed_save_has_left_does_not_take_the_room_of_the_next(
    model, tmp_path, monkeypatch
):
    optimizer = build_adamw(model, learning_rate=1e-2)
    steps(model, optimizer, range(1))
    left = tmp_path / ".step-00000001.tmp"
    left.mkdir()

    def usage(_):
        return type(
            "Usage", (), {"free": 0 if left.exists() else checkpoint_bytes(model, optimizer)}
        )

    monkeypatch.setattr(checkpoint_folders.shutil, "disk_usage", usage)
    assert save(tmp_path, 2, model, optimizer).name == "step-00000002"


@pytest.mark.parametrize(("moments", "each"), [("fp32", 12), ("bf16", 8)])
def test_a_checkpoint_takes_the_room_that_was_reckoned(model, tmp_path, moments, each):
    optimizer = build_adamw(model, learning_rate=1e-2, moments=moments)
    steps(model, optimizer, range(1))
    path = save(tmp_path, 1, model, optimizer)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert size <= checkpoint_bytes(model, optimizer)
    tensors = each * sum(parameter.numel() for parameter in model.parameters())
    assert size >= 0.8 * tensors  # the padding of the vocabulary is not written as weights


LIMITED = """
import resource, signal, sys, pickle
from pathlib import Path
from tests.training.test_loop import run
recipe, limit = pickle.loads(Path(sys.argv[1]).read_bytes())
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
run(recipe)
"""


def run_limited(recipe, tmp_path, limit):
    """Train where no file may grow beyond `limit` bytes, which the kernel sees to."""
    (tmp_path / "arguments").write_bytes(pickle.dumps((recipe, limit)))
    return run_python("-c", LIMITED, str(tmp_path / "arguments"))


@pytest.mark.slow
def test_a_disk_that_fills_up_costs_no_checkpoint_and_the_run_goes_on(recipe, tmp_path):
    limit = 150_000  # bytes: less than the weights, more than any row
    run(change(recipe, run={"max_steps": 3}))
    (newest,) = Path(recipe.run.dir, "checkpoints").iterdir()
    assert (newest / "model.safetensors").stat().st_size > limit
    result = run_limited(recipe, tmp_path, limit)
    assert result.returncode == 0, result.stderr
    assert "the checkpoint could not be written: [Errno 27] File too large" in result.stdout
    assert "resumable at step 3" in result.stdout
    assert status(recipe)["state"] == "resumable"
    assert "make room and start again" in status(recipe)["reason"]
    assert find_newest(Path(recipe.run.dir, "checkpoints")) == newest
    said = [row for row in read_rows(recipe.run.dir) if row["kind"] == "event"]
    assert [(row["event"], row["step"]) for row in said] == [("not_saved", 6), ("not_saved", 8)]
    run(recipe)  # there is room now
    whole = change(recipe, run={"dir": str(tmp_path / "whole")})
    run(whole)
    rows = [
        [row for row in read_rows(config.run.dir) if row["kind"] == "train"]
        for config in (recipe, whole)
    ]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_no_room_for_the_metrics_stops_a_run_resumable(prepared, tmp_path):
    from tests.test_recipes import tiny_flags

    folder = tmp_path / "run"
    flags = [*tiny_flags(prepared, folder), "--checkpoint.every", "2"]
    first = run_python("recipes/gpt2_124m.py", *flags, "--run.max_steps", "2")
    assert first.returncode == 0, first.stderr
    limit = (folder / "metrics.jsonl").stat().st_size + 100

    def set_limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "recipes/gpt2_124m.py", *flags]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, preexec_fn=set_limit, timeout=300
    )
    assert result.returncode == 75, result.stderr
    assert "make room and start again" in result.stderr
    assert "Traceback" not in result.stderr
    state = json.loads((folder / "status.json").read_text())
    assert (state["state"], state["step"]) == ("resumable", 2)
    again = run_python("recipes/gpt2_124m.py", *flags)
    assert again.returncode == 0, again.stderr
    steps_told = [row["step"] for row in read_rows(folder) if row["kind"] == "train"]
    assert steps_told == list(range(1, 9))


@pytest.mark.slow
def test_the_second_interrupt_does_not_wait_for_a_save(prepared, tmp_path):
    """The thread that writes is a daemon: the process may end with a save half done."""
    code = (
        "import threading, time, os, signal; from pretrain_lib.checkpoint import writer as saver;"
        "signal.signal(signal.SIGINT, signal.default_int_handler);"  # else ignored behind a shell
        "saver.write_checkpoint = lambda *a, **k: time.sleep(600);"
        "import torch, pretrain_lib as pl;"
        "from tests.checkpoint.test_writer import writer, GPT2_SHAPE;"
        "from pathlib import Path; model = pl.GPT2(GPT2_SHAPE);"
        f"w = writer(Path({str(tmp_path)!r}), model);"
        "optimizer = pl.build_adamw(model, learning_rate=0.1);"
        "w.start(pl.TrainingState(), model, optimizer); os.kill(os.getpid(), signal.SIGINT)"
    )
    result = run_command(sys.executable, "-c", code, timeout=300)
    assert result.returncode in (1, -signal.SIGINT, 130)
    assert "KeyboardInterrupt" in result.stderr
    assert not any(tmp_path.iterdir())
