"""What reads a checkpoint of a run that removes it meanwhile: whole results, or one error."""

import json
import shutil
from unittest.mock import ANY

import pytest

from pretrain_lib.commands import model as commands
from pretrain_lib.commands.cli import main
from pretrain_lib.evaluate import harness
from pretrain_lib.evaluate.local_tasks import write_local_tasks
from pretrain_lib.models import hf
from tests.conftest import change, small_recipe
from tests.faults.test_full_disk import start

pytestmark = pytest.mark.slow
STEP = "checkpoints/step-00000002"
TASKS = ["--tasks", "heldout_choice", "--limit", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def workplace(prepared, tmp_path_factory):
    """A folder with a `run` of two steps and `tasks`."""
    folder = tmp_path_factory.mktemp("removed")
    sizes = {"context_characters": 16, "ending_characters": 8, "document_characters": 50}
    write_local_tasks(prepared, folder / "tasks", items=2, **sizes)
    config = change(small_recipe(prepared, folder), log={"every": 1})
    with pytest.MonkeyPatch.context() as patches:
        assert start(config, patches, **{"run.max_steps": 2}) == 0
    return folder


@pytest.fixture
def folder(workplace, tmp_path):
    """A folder of a test's own with the same."""
    shutil.copytree(workplace, tmp_path / "own")
    return tmp_path / "own"


def command(*words, capsys):
    """Return the exit code of a `pretrain` command, and what it has printed as errors."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return end.value.code, capsys.readouterr().err


def readers(folder):
    step, tasks = folder / "run" / STEP, ["--include_path", folder / "tasks"]
    return {
        "export": ["export", step, "--out", folder / "out"],
        "eval": ["eval", step, *TASKS, *tasks, "--out", folder / "out"],
        "sample": ["sample", step, "--prompt", "a", "--tokens", "4"],
    }


def remove_around(monkeypatch, *, before):
    """Remove the checkpoint before or after its weights are read."""
    read = hf.read_tensors

    def reading(folder):
        if before:
            shutil.rmtree(folder)
        yield from read(folder)
        shutil.rmtree(folder)

    monkeypatch.setattr(hf, "read_tensors", reading)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("name", ["export", "eval", "sample"])
def test_a_command_says_that_the_run_has_removed_what_it_reads(
    name, before, folder, monkeypatch, capsys
):
    remove_around(monkeypatch, before=before)
    code, error = command(*readers(folder)[name], capsys=capsys)
    told = [line for line in error.splitlines() if line.startswith("error: ")]
    assert code == 2 and not (folder / "out").exists()
    assert len(told) == 1 and f"{STEP} was removed or replaced while it was read" in told[0]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("setting", ["run.resume", "run.initial_weights"])
def test_a_run_that_begins_with_it_says_so_too(
    setting, before, folder, prepared, tmp_path, monkeypatch, capsys
):
    remove_around(monkeypatch, before=before)
    flags = {setting: folder / "run" / STEP, "run.max_steps": 4}
    assert start(small_recipe(prepared, tmp_path), monkeypatch, **flags) == 2
    assert f"{STEP} was removed or replaced while it was read" in capsys.readouterr().err


def test_an_export_is_whole_once_the_checkpoint_is_read(folder, monkeypatch, capsys, forked_reload):
    words = readers(folder)["export"]
    assert command(*words, capsys=capsys) == (0, ANY)
    expected = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    draw = commands.plot_runs

    def remove_and_draw(runs, *rest, **options):
        shutil.rmtree(folder / "run" / STEP)
        return draw(runs, *rest, **options)

    monkeypatch.setattr(commands, "plot_runs", remove_and_draw)
    assert command(*words, capsys=capsys) == (0, ANY)
    assert {path.name: path.read_bytes() for path in (folder / "out").iterdir()} == expected
    assert {"tokenizer.json", "curves.png"} <= expected.keys()
    assert b"## Training" in expected["README.md"]


@pytest.mark.parametrize("flags", [[], ["--harness"]])
def test_an_evaluation_goes_on_once_the_checkpoint_is_read(flags, folder, monkeypatch, capsys):
    words = [*readers(folder)["eval"], *flags]
    assert command(*words, capsys=capsys) == (0, ANY)
    expected = json.loads((folder / "out").read_text())
    open_tasks = harness.open_tasks

    def remove_and_open(*tasks, **options):
        shutil.rmtree(folder / "run" / STEP)
        return open_tasks(*tasks, **options)

    monkeypatch.setattr(harness, "open_tasks", remove_and_open)
    assert command(*words, capsys=capsys) == (0, ANY)
    found = json.loads((folder / "out").read_text())
    assert found["results"] == expected["results"]
    assert found["config"]["model"] == ("hf" if flags else "LiveModel")
