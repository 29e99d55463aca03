"""Errors that nobody expected: traceback, log, status, and a line that says what to report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain_lib.config.units import Text
from pretrain_lib.run_folder.layout import ERRORS
from pretrain_lib.training.run_recipe import run_recipe
from tests.conftest import ROOT


def start(recipe, monkeypatch, action):
    monkeypatch.setattr(sys, "argv", ["recipe.py"])
    with pytest.raises(SystemExit) as end:
        run_recipe(action, recipe)
    return end.value.code


def test_a_bug_in_a_run_is_logged_and_said(recipe, monkeypatch, capsys):
    def fail(config):
        return {}["no such key"]

    assert start(recipe, monkeypatch, fail) == 1
    folder = Path(recipe.run.dir)
    *traceback, last = capsys.readouterr().err.splitlines()
    assert "Traceback" in traceback[0] and traceback[-1] == "KeyError: 'no such key'"
    assert last.startswith(f"error: KeyError, which is unexpected: the traceback is in {folder}")
    assert "please report it" in last
    assert (folder / ERRORS).read_text().splitlines() == traceback
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("failed", "KeyError: 'no such key'")


@pytest.mark.parametrize(
    ("error", "said", "code"),
    [
        (OSError(5, "Input/output error", "x"), "[Errno 5] Input/output error: 'x': look at", 1),
        (PermissionError(13, "Permission denied", "x"), "give the permission; started again", 1),
        (FloatingPointError("10 updates in a row"), "error: 10 updates in a row", 3),
    ],
)
def test_what_is_no_bug_is_one_line(recipe, monkeypatch, capsys, error, said, code):
    def fail(config):
        raise error

    assert start(recipe, monkeypatch, fail) == code
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and shown.count("\n") == 1 and said in shown
    assert json.loads(Path(recipe.run.dir, "status.json").read_text())["state"] == "failed"
    assert not Path(recipe.run.dir, ERRORS).exists()


def test_text_is_utf8_in_every_locale():
    escaped = "élan 字".encode().decode("ascii", "surrogateescape")
    assert Text.parse(escaped) == Text.parse("élan 字") == "élan 字"
    with pytest.raises(ValueError, match="is not UTF-8"):
        Text.parse(b"\xff".decode("ascii", "surrogateescape"))


@pytest.mark.slow
def test_a_prompt_beyond_ascii_is_taken_in_the_c_locale(tmp_path):
    variables = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "pretrain_lib.commands.cli", "sample", tmp_path]
    result = subprocess.run(
        [*command, "--prompt", "élan"],
        env=os.environ | variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith(f"error: {tmp_path} is neither a model folder")
