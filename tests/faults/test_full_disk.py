"""A disk that is really full: the run is resumable, says so, and goes on when there is room."""

import json
import os
import sys
from pathlib import Path

import pytest

from pretrain_lib import GPT2, open_corpus, start_accelerator, train
from pretrain_lib.checkpoint.folders import find_newest
from pretrain_lib.run_folder.status import read_status, write_status
from pretrain_lib.training.run_recipe import run_recipe
from tests.conftest import change, fill, read_rows, run_pretrain


def start(recipe, monkeypatch, **flags):
    def run(config):
        model = GPT2(config.model).initialize(0)
        return train(config, model, open_corpus(config), start_accelerator(config))

    words = [f"--{name}={value}" for name, value in flags.items()]
    monkeypatch.setattr(sys, "argv", ["recipe.py", *words])
    with pytest.raises(SystemExit) as end:
        run_recipe(run, recipe)
    return end.value.code


def test_a_run_on_a_full_disk_is_resumable_and_says_so(recipe, disk, monkeypatch, capsys):
    config = change(recipe, run={"dir": str(disk / "run")}, checkpoint={"every": 2, "keep_last": 1})
    assert start(config, monkeypatch, **{"run.max_steps": 3}) == 0
    whole = change(config, run={"dir": str(disk / "whole")})
    assert start(whole, monkeypatch) == 0
    filler = fill(disk)
    before = find_newest(disk / "run" / "checkpoints")
    assert start(config, monkeypatch) == 75
    error = capsys.readouterr().err
    assert "No space left on device" in error and "Traceback" not in error
    status = json.loads((disk / "run" / "status.json").read_text())
    assert status["state"] == "resumable" and "No space left" in status["reason"]
    assert status["step"] == 3 and find_newest(disk / "run" / "checkpoints") == before
    filler.unlink()
    assert start(config, monkeypatch) == 0
    assert read_status(disk / "run")["state"] == "done"
    rows = [
        [r for r in read_rows(f) if r["kind"] == "train"] for f in (disk / "run", whole.run.dir)
    ]
    assert rows[0] == rows[1]
    names = [
        {str(p.relative_to(d)) for p in Path(d).rglob("*")} for d in (disk / "run", whole.run.dir)
    ]
    assert names[0] == names[1]


def test_a_status_is_replaced_in_its_place_on_a_full_disk(disk):
    write_status(disk, "running", step=3)
    filler = fill(disk)
    write_status(disk, "resumable", step=3, reason="the disk is full " * 20)
    assert read_status(disk)["reason"].startswith("the disk is full")
    write_status(disk, "failed", step=3)
    assert read_status(disk) == {"state": "failed", "step": 3, "reason": ""}
    assert {path.name for path in disk.iterdir()} == {"status.json", "filler"}
    filler.unlink()


def test_what_else_writes_names_the_place_and_leaves_nothing(recipe, tmp_path, disk):
    config = change(recipe, run={"dir": str(disk / "run"), "max_steps": 2})
    model = GPT2(config.model).initialize(0)
    assert train(config, model, open_corpus(config), start_accelerator(config)) == "done"
    filler = fill(disk)
    there = {path.name for path in disk.iterdir()}
    for words in (
        ["export", str(disk / "run"), "--out", str(disk / "exported")],
        ["plot", str(disk / "run"), "--out", str(disk / "picture.png")],
        ["report", str(disk / "run"), "--out", str(disk / "report.html")],
        ["new", "gpt2_124m", str(disk / "new")],
    ):
        if words[0] == "new":  # for a part of its files
            os.truncate(filler, filler.stat().st_size - 8192)
        result = run_pretrain(*words)
        assert result.returncode == 2, words
        (line,) = result.stderr.strip().splitlines()
        assert "No space left on device" in line and Path(words[-1]).name in line, line
    left = {path.name for path in disk.iterdir()} - there - {"new"}
    assert not left and not any((disk / "new").iterdir())
    filler.unlink()
    assert run_pretrain("new", "gpt2_124m", str(disk / "new")).returncode == 0
