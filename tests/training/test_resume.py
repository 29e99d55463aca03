"""A run goes on from what was saved when settings had other names."""

import json
from pathlib import Path

import pytest

from pretrain_lib.checkpoint.folders import FILES, MANIFEST, describe_files
from tests.conftest import change, read_rows
from tests.training.test_loop import elsewhere, run, status

pytestmark = pytest.mark.moderate

# The section `run` of a checkpoint's manifest as it was written before the settings were taken
# apart by concern; the folder and the intervals are those of the run below.
RUN_BEFORE = {
    "seed": 1337,
    "max_steps": 3,
    "max_time": None,
    "save_every": 3,
    "save_every_tokens": None,
    "keep_last": 3,
    "keep_every": None,
    "log_every": 1,
    "evaluate_every": 4,
    "evaluate_tokens": 512,
    "resume": "auto",
    "initial_weights": None,
    "allow_changes": [],
    "compile": None,
    "recompute": "none",
    "gather": "fp32",
    "processes": None,
    "max_skipped": 10,
    "spike_sigma": None,
    "spike_window": 128,
    "spike_action": "skip",
    "collective_timeout": 1800.0,
    "trackers": [],
}
NEW_SECTIONS = ("log", "checkpoint", "validation", "stability", "system")


def write_as_before(folder):
    """Give the checkpoint and the run in a folder the settings' old names."""
    for path in (folder / "checkpoints" / "step-00000003" / MANIFEST, folder / "manifest.json"):
        manifest = json.loads(path.read_text())
        for section in NEW_SECTIONS:
            del manifest["config"][section]
        manifest["config"]["run"] = {"dir": str(folder)} | RUN_BEFORE
        path.write_text(json.dumps(manifest))
    checkpoint = folder / "checkpoints" / "step-00000003"
    (checkpoint / FILES).write_text(json.dumps(describe_files(checkpoint)))


def test_a_checkpoint_with_old_names_resumes_bit_equal(recipe, tmp_path, capsys):
    run(recipe)
    old = elsewhere(recipe, tmp_path / "old")
    run(change(old, run={"max_steps": 3}))
    write_as_before(tmp_path / "old")
    capsys.readouterr()
    run(change(old, checkpoint={"every": 2}))
    shown = capsys.readouterr().out
    assert "resumed at step 3" in shown
    assert "changed since the checkpoint: checkpoint.every was 3, is 2" in shown
    changes = [line for line in shown.splitlines() if line.startswith("changed since")]
    assert len(changes) == 2  # and run.max_steps
    assert status(old)["state"] == "done"
    rows = [
        [row for row in read_rows(config.run.dir) if row["kind"] == "train"]
        for config in (old, recipe)
    ]
    assert rows[0] == rows[1]


def test_what_was_fixed_stays_so_under_its_new_name(recipe, tmp_path):
    run(change(recipe, run={"max_steps": 3}))
    write_as_before(Path(recipe.run.dir))
    stricter = change(recipe, stability={"spike_sigma": 6.0})
    with pytest.raises(ValueError, match=r"stability\.spike_sigma was None, is 6\.0"):
        run(stricter)
    run(change(stricter, run={"allow_changes": ["stability.spike_sigma"]}))
    assert status(recipe)["step"] == 8


def test_another_launch_is_told_in_a_users_words(recipe, tmp_path, capsys):
    run(change(recipe, run={"max_steps": 3}, data={"validation": "none"}))
    assert "validation is off (data.validation=none)" in capsys.readouterr().out
    checkpoint = Path(recipe.run.dir) / "checkpoints" / "step-00000003"
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    launch = {"file": "two.yaml", "default": False, "settings": {"main_process_port": 0}}
    manifest["world"] |= {"processes": 2, "distributed": "MULTI_CPU", "configuration": launch}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    (checkpoint / FILES).write_text(json.dumps(describe_files(checkpoint)))
    run(change(recipe, run={"max_steps": 3}, data={"validation": "none"}))
    shown = capsys.readouterr().out.splitlines()
    changes = [line for line in shown if line.startswith("changed since the checkpoint")]
    assert changes == ["changed since the checkpoint: processes was 2, is 1"]
