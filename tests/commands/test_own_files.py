"""Files of the user's own: no command replaces one, and what is refused leaves nothing behind."""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from pretrain_lib import GPT2, GPT2Config, open_corpus, prepare, start_accelerator, train
from pretrain_lib.commands.cli import main
from pretrain_lib.data.prepare.job import Job
from pretrain_lib.files.outputs import check_file, check_folder
from pretrain_lib.models.any_model import save_pretrained
from pretrain_lib.run_folder.folder import open_run_folder
from pretrain_lib.run_folder.layout import check_run_folder
from pretrain_lib.training.run_recipe import run_recipe
from tests.conftest import change


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def own(tmp_path):
    """A folder of somebody's own, with names that are also ours."""
    folder = tmp_path / "own"
    (folder / "plots").mkdir(parents=True)
    for name in ("config.yaml", "manifest.json", "status.json", "metrics.jsonl", "notes.md"):
        (folder / name).write_text(f"my {name}")
    return folder


def exit_of(function, *arguments):
    with pytest.raises(SystemExit) as end:
        function(*arguments)
    return end.value.code


def start(recipe, monkeypatch, **flags):
    """Run a recipe as a program; return its exit code."""

    def run(config):
        model = GPT2(config.model).initialize(0)
        return train(config, model, open_corpus(config), start_accelerator(config))

    words = [f"--{name}={value}" for name, value in flags.items()]
    monkeypatch.setattr(sys, "argv", ["recipe.py", *words])
    return exit_of(run_recipe, run, recipe)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    shape = {"vocabulary_size": 16, "context_length": 8, "num_layers": 1, "width": 8}
    save_pretrained(GPT2(GPT2Config(num_heads=1, **shape)).initialize(0), folder, tokenizer=None)
    return folder


COMMANDS = (
    "prepare {text} --train_tokenizer 300 --out {own}",
    "prepare {own} --train_tokenizer 300 --out {own}",
    "tasks {data} --out {own} --items 4",
    "export {model} --out {own}",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_writes_into_a_folder_of_somebodys_own(
    own, prepared, model, tmp_path, capsys, command
):
    (tmp_path / "text.txt").write_text("some text " * 100)
    (own / "a.txt").write_text("some text " * 100)
    before = digests(tmp_path)
    named = {"text": tmp_path / "text.txt", "own": own, "data": prepared, "model": model}
    assert exit_of(main, command.format(**named).split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --out {own} is ") and error.count("\n") == 1
    assert digests(tmp_path) == before


@pytest.mark.parametrize("name", ["own", "own/.", "text", "data"])
def test_no_run_begins_in_a_folder_of_somebodys_own(
    recipe, own, prepared, tmp_path, monkeypatch, capsys, name
):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("some text")
    shutil.copytree(prepared, tmp_path / "data")
    before = digests(tmp_path)
    flags = {"data.path": tmp_path / "data"} if name == "data" else {}
    assert start(recipe, monkeypatch, **{"run.dir": tmp_path / name}, **flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: run.dir=") and error.count("\n") == 1
    assert "give a new folder" in error or "same folder" in error
    assert digests(tmp_path) == before
    monkeypatch.chdir(own)
    assert start(recipe, monkeypatch, **{"run.dir": "."}) == 2
    assert digests(tmp_path) == before


def test_a_new_folder_for_run_and_data_is_refused(recipe, tmp_path, monkeypatch, capsys):
    both = tmp_path / "both"
    flags = {"run.dir": both, "data.path": both, "data.source": "python-stdlib"}
    assert start(recipe, monkeypatch, **flags) == 2
    assert "are the same folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_train_itself_leaves_a_folder_of_somebodys_own_alone(recipe, own):
    (own / "status.json").unlink()
    config, before = change(recipe, run={"dir": str(own)}), digests(own)
    with pytest.raises(ValueError, match=r"run.dir=.* is neither empty nor a run folder"):
        train(
            config, GPT2(config.model).initialize(0), open_corpus(config), start_accelerator(config)
        )
    assert digests(own) == before


@pytest.mark.parametrize(
    "flags",
    [
        {"data.path": "{d}/none"},
        {"run.resume": "{d}/none"},
        {"model.vocabulary_size": "300"},
        {"run.initial_weights": "{d}/none"},
    ],
)
def test_a_refused_run_leaves_nothing_behind(recipe, tmp_path, monkeypatch, capsys, flags):
    flags = {name: value.format(d=tmp_path) for name, value in flags.items()}
    assert start(recipe, monkeypatch, **flags, **{"run.dir": tmp_path / "a" / "run"}) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_a_refused_start_leaves_a_run_as_it_was(recipe, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    assert start(recipe, monkeypatch, **{"run.max_steps": 3}) == 0
    before = digests(folder)
    assert start(recipe, monkeypatch, **{"optimizer.learning_rate": 0.5}) == 2
    assert digests(folder) == before


def test_logs_and_hidden_files_do_not_stand_in_the_way(recipe, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("job.log", "slurm-1.out", ".hidden"):
        (folder / name).write_text(name)
    assert start(recipe, monkeypatch, **{"run.max_steps": 0}) == 0
    for name in ("job.log", "slurm-1.out", ".hidden"):
        assert (folder / name).read_text() == name
    assert start(recipe, monkeypatch, **{"run.max_steps": 1}) == 0  # its own folder


def test_a_run_whose_checkpoints_were_deleted_keeps_its_metrics(
    recipe, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run"
    assert start(recipe, monkeypatch) == 0
    shutil.rmtree(folder / "checkpoints")
    before = digests(folder)
    assert start(recipe, monkeypatch) == 2
    assert "had a checkpoint of step 8 and has none" in capsys.readouterr().err
    assert digests(folder) == before


@pytest.mark.parametrize(
    ("manifest", "status", "is_ours"),
    [
        ('{"config": {}, "data_fingerprint": ""}', None, True),
        ('{"config": {}}', None, False),
        ("[]", '{"state": "done"}', True),
        ("", '{"state": "mine"}', False),
        ("\0\0", "\0", False),
    ],
)
def test_a_run_folder_is_known_by_its_content(tmp_path, manifest, status, is_ours):
    (tmp_path / "manifest.json").write_text(manifest)
    (tmp_path / "notes.txt").write_text("")
    if status is not None:
        (tmp_path / "status.json").write_text(status)
    if is_ours:
        check_run_folder(tmp_path)
    else:
        with pytest.raises(ValueError, match="neither empty nor a run folder"):
            check_run_folder(tmp_path)


def test_a_run_that_was_killed_before_it_had_a_manifest_is_one(recipe, tmp_path):
    folder = tmp_path / "run"
    with open_run_folder(folder, resume="auto"):
        (folder / "recipe.yaml").touch()
        (folder / "data").mkdir()  # its text is being prepared
        check_run_folder(folder)


@pytest.mark.parametrize("command", ["eval {m} --tasks x", "overlap {m} --items {m}/x"])
def test_outputs_are_tried_before_the_work(model, tmp_path, capsys, command):
    out = tmp_path / "folder" / ("x" * 300)
    assert exit_of(main, [*command.format(m=model).split(), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "cannot be written" in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_tried_stays_as_it_is(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text("mine")
    check_file(path, named="--out ")
    assert path.read_text() == "mine" and list(tmp_path.iterdir()) == [path]
    check_file(tmp_path / "new" / "scores.json", named="--out ")
    check_folder(tmp_path / "new", named="--out ", kind="x", is_ours=lambda _: False)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/proc/1").exists(), reason="asks /proc as root")
def test_where_nothing_can_be_written_one_line_says_so(model, capsys):
    assert exit_of(main, ["eval", str(model), "--tasks", "x", "--out", "/proc/x/y.json"]) == 2
    assert "--out /proc/x/y.json cannot be written" in capsys.readouterr().err


def test_exports_and_staged_files_have_names_that_no_user_has(model, tmp_path, forked_reload):
    mine = {}
    for name in ("out.tmp", "out.old", "out.new", ".out.tmp", "scores.json.tmp"):
        (tmp_path / name).mkdir()
        mine[name] = (tmp_path / name / "file").write_text(name)
    assert exit_of(main, ["export", str(model), "--out", str(tmp_path / "out")]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"out", *mine}
    assert all((tmp_path / name / "file").read_text() == name for name in mine)


def test_prepare_goes_on_in_its_own_folder_and_leaves_hidden_files(tmp_path):
    (tmp_path / "text.txt").write_text("some text of a few words " * 100)
    job = Job((str(tmp_path / "text.txt"),), train_tokenizer=300, validation="none")
    folder = tmp_path / "data"
    prepare(job, folder, quiet=True)
    (folder / "manifest.json").unlink()  # as after a kill
    (folder / ".ipynb_checkpoints").mkdir()
    assert prepare(job, folder, quiet=True)["splits"]["train"]["documents"] == 1
    assert (folder / ".ipynb_checkpoints").is_dir()
    assert json.loads((folder / "job.json").read_text())["validation"] == "none"


@pytest.mark.parametrize("name", ["overlay.yaml", "mine.json"])
@pytest.mark.parametrize("command", ["eval {m} --tasks x", "overlap {m} --items {m}/x"])
def test_a_result_replaces_no_file_of_somebodys_own(model, tmp_path, capsys, command, name):
    mine = tmp_path / name
    mine.write_text('{"mine": 1}')
    assert exit_of(main, [*command.format(m=model).split(), "--out", str(mine)]) == 2
    error = capsys.readouterr().err
    assert f"--out {mine} is there, and no result of this command" in error
    assert error.count("\n") == 1 and mine.read_text() == '{"mine": 1}'


def test_a_result_replaces_an_earlier_one(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text('{"results": {}}')
    check_file(path, named="--out ", holds=["results"])


@pytest.mark.parametrize("text", ['{"other": "x"}', '{"text": 5}'])
def test_a_refused_preparation_leaves_nothing(tmp_path, capsys, text):
    (tmp_path / "good.txt").write_text("some text " * 50)
    job = Job((tmp_path / "good.txt",), train_tokenizer=260, validation="none")
    prepare(job, tmp_path / "good", quiet=True)
    (tmp_path / "a.jsonl").write_text(f"{text}\n" * 200)
    out, tokenizer = tmp_path / "out", tmp_path / "good" / "tokenizer"
    command = ["prepare", tmp_path / "a.jsonl", "--tokenizer", tokenizer, "--out", out]
    assert exit_of(main, [*map(str, command)]) == 2
    assert not out.exists()
