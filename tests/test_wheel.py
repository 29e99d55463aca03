"""The wheel, installed where there is no checkout: from text to a scored, exported model."""

import json
import os
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.conftest import ROOT

SMALL = [
    *("--model.num_layers", "1", "--model.num_heads", "2", "--model.width", "32"),
    *("--model.context_length", "32", "--batch.sequence_length", "32"),
    *("--batch.tokens", "256", "--batch.micro_batch", "4"),
    *("--schedule.epochs", "0.1", "--validation.tokens", "1024", "--log.every", "10"),
]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return a function that runs commands of a fresh environment, away from the checkout.

    What the package needs is shared with the environment of the tests; the package itself is not.
    """
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", folder, ROOT], check=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", symlinks=True)
    (packages,) = (folder / "env" / "lib").glob("python*/site-packages")
    (packages / "shared.pth").write_text("\n".join(site.getsitepackages()))
    python = folder / "env" / "bin" / "python"
    install = [*pip, "--python", python, "install", "--no-deps", "--ignore-installed"]
    subprocess.run([*install, wheel], check=True)
    (folder / "work").mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(command, *arguments):
        done = subprocess.run(
            [python.with_name("pretrain"), command, *arguments],
            cwd=folder / "work",
            env=environment | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run.folder = folder / "work"
    where = subprocess.run(
        [python, "-c", "import pretrain_lib; print(pretrain_lib.__file__)"],
        cwd=run.folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(packages), where
    return run


@pytest.mark.slow
def test_a_stranger_without_a_checkout_comes_to_a_scored_model(installed):
    installed("new", "gpt2_124m", "mine")
    text = "".join(f"The {n}th line is about the number {n} and no other.\n" for n in range(4000))
    (installed.folder / "text.txt").write_text(text)
    options = ["--train_tokenizer", "300", "--validation", "first:2000", "--out", "data"]
    installed("prepare", "text.txt", *options)
    flags = ["--data.path", "data", "--run.dir", "run", *SMALL]
    shown = installed("train", "mine/gpt2_124m.py", *flags)
    assert "accelerate launch" in shown
    status = json.loads((installed.folder / "run" / "status.json").read_text())
    assert status["state"] == "done"
    assert "The" in installed("sample", "run", "--prompt", "The", "--tokens", "8")
    installed("tasks", "data", "--items", "4", "--out", "tasks")
    tasks = ["--tasks", "heldout_perplexity", "--include_path", "tasks"]
    assert "bits_per_byte" in installed("eval", "run", *tasks)
    assert "loaded again" in installed("export", "run", "--out", "model")
    shown = installed("train", "llama_1_3b", "--plan")
    assert "parameters       1,266,780,160" in shown
