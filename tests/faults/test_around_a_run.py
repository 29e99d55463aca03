"""What may happen beside a run: its folder goes, a file of its own is damaged, a tracker fails."""

import json
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from pretrain_lib.run_folder.metrics import Metrics
from pretrain_lib.run_folder.status import read_status
from pretrain_lib.training import loop
from tests.conftest import change, read_rows
from tests.faults.test_full_disk import start

pytestmark = pytest.mark.slow


def train_rows(folder):
    return [row for row in read_rows(folder) if row["kind"] == "train"]


def test_a_run_whose_folder_is_moved_says_so_and_goes_on_there(
    recipe, tmp_path, monkeypatch, capsys
):
    run, moved, step = tmp_path / "run", tmp_path / "moved", loop._step

    def move(parts, *rest):
        if parts.state.step == 4 and run.exists():
            loop._note_saved(parts)  # a save in progress may fail as well
            run.rename(moved)
        return step(parts, *rest)

    monkeypatch.setattr(loop, "_step", move)
    assert start(recipe, monkeypatch) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error and not run.exists()
    assert [line for line in error.splitlines() if "error" in line] == [
        line for line in error.splitlines() if f"error: run.dir={run} is gone (" in line
    ]
    monkeypatch.setattr(loop, "_step", step)
    assert start(recipe, monkeypatch, **{"run.dir": moved}) == 0
    assert start(recipe, monkeypatch) == 0
    assert train_rows(moved) == train_rows(run)


@pytest.mark.parametrize("content", [b"", b"[]", bytes(99), b"[" * 100_000, b"\xff"])
@pytest.mark.filterwarnings("always")
def test_damaged_records_of_a_run_stop_no_start(recipe, monkeypatch, capsys, content):
    folder = Path(recipe.run.dir)
    assert start(change(recipe, checkpoint={"every": 2}), monkeypatch, **{"run.max_steps": 2}) == 0
    for name in ("manifest.json", "status.json"):
        (folder / name).write_bytes(content)
    with pytest.warns(UserWarning, match="manifest.json is damaged") as warned:
        assert start(recipe, monkeypatch, **{"run.max_steps": 4}) == 0
    assert any("status.json is damaged" in str(each.message) for each in warned)
    assert "Traceback" not in capsys.readouterr().err
    assert json.loads((folder / "manifest.json").read_text())["starts"][-1]["step"] == 2
    assert read_status(folder)["step"] == 4


class Broken(GeneralTracker):
    """A tracker whose process has ended."""

    name, requires_logging_directory, tracker = "broken", False, None
    main_process_only = True

    def __init__(self):
        super().__init__()
        self.logged = 0

    def store_init_configuration(self, values):
        """Take the settings."""

    def log(self, values, step=None, **_):
        """Fail from the second row on."""
        self.logged += 1
        if self.logged > 1:
            raise BrokenPipeError(32, "Broken pipe")

    def finish(self):
        """Fail."""
        raise ConnectionError("no connection")


def test_a_tracker_that_fails_ends_no_run(tmp_path, capsys):
    tracker = Broken()
    accelerator = Accelerator(cpu=True, log_with=[tracker])
    accelerator.init_trackers("some run")
    metrics = Metrics(tmp_path / "metrics.jsonl", accelerator, total_steps=4)
    for step in range(1, 5):
        metrics.write({"kind": "train", "step": step, "tokens": step, "loss": 1.0})
    said = capsys.readouterr().out
    assert said.count("BrokenPipeError: [Errno 32] Broken pipe") == 1 and tracker.logged == 2
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3, 4]
    metrics.end_trackers()
    assert "ConnectionError: no connection" in capsys.readouterr().out
    metrics.close()
