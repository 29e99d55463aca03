"""Resuming: settings that had other names, other steps and windows, going back within a run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from pretrain_lib import open_corpus
from pretrain_lib.checkpoint.folders import FILES, MANIFEST, STATE, describe_files
from pretrain_lib.checkpoint.state import read_state
from pretrain_lib.data.tokens.arrays import open_split
from pretrain_lib.distributed.engine import start_accelerator
from pretrain_lib.run_folder.folder import MANIFEST as MANIFEST_OF_RUN
from pretrain_lib.run_folder.folder import (
    build_manifest,
    describe_changes,
    setting_changes,
    unsafe_changes,
)
from pretrain_lib.training import loop
from pretrain_lib.training.checkpoint_choice import check_resume
from tests.conftest import VOCABULARY, change, read_rows
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
    with pytest.raises(ValueError, match=r"stability\.spike_sigma was null, is 6\.0"):
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


@pytest.fixture
def failing_step(monkeypatch):
    """Return what lets the training loop fail in its so many-th step from now."""
    step = loop._step

    def set_failure(number):
        calls = iter(range(number))

        def fail(*arguments):
            if next(calls, None) is None:
                raise RuntimeError("killed here")
            return step(*arguments)

        monkeypatch.setattr(loop, "_step", fail)

    return set_failure


@pytest.fixture
def signal_in_step(monkeypatch):
    """Return what lets SIGTERM arrive in the step after so many, and in no later session."""
    step = loop._step

    def set_signal(number):
        def signalled(run, batches):
            if run.state.step == number:
                os.kill(os.getpid(), signal.SIGTERM)
                monkeypatch.undo()
            return step(run, batches)

        monkeypatch.setattr(loop, "_step", signalled)

    return set_signal


@pytest.mark.parametrize("number", [3, 7])
def test_a_signal_leaves_the_evaluation_that_is_due_to_the_next_session(
    recipe, tmp_path, signal_in_step, number, capsys
):
    run(recipe)
    stopped = elsewhere(recipe, tmp_path / "stopped")
    signal_in_step(number)  # validation and samples are due after it
    run(stopped)
    assert status(stopped)["state"] == "resumable"
    rows = read_rows(stopped.run.dir)
    assert (rows[-1]["kind"], rows[-1]["step"]) == ("train", number + 1)
    # A kill while the checkpoint is replaced by that of the evaluated step costs nothing.
    checkpoints = Path(stopped.run.dir, "checkpoints")
    (own,) = (path for path in checkpoints.iterdir() if int(path.name[5:]) == number + 1)
    own.rename(own.with_name(f".{own.name}.old"))
    for step in (number + 1, 8):
        capsys.readouterr()
        run(stopped)
        assert f"resumed at step {step} " in capsys.readouterr().out
        assert read_rows(stopped.run.dir) == read_rows(recipe.run.dir)
    states = [last_state(config) for config in (recipe, stopped)]
    assert states[0].best_loss == states[1].best_loss
    samples = [Path(config.run.dir, "samples.jsonl").read_bytes() for config in (recipe, stopped)]
    assert samples[0] == samples[1]


def test_an_evaluation_that_failed_is_repeated(recipe, tmp_path, monkeypatch):
    run(recipe)
    failed = elsewhere(recipe, tmp_path / "failed")
    with monkeypatch.context() as patch:
        patch.setattr("pretrain_lib.training.evaluation.sample_texts", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(failed)
    run(failed)
    assert read_rows(failed.run.dir) == read_rows(recipe.run.dir)


def test_going_back_in_a_run_drops_what_came_after(recipe, tmp_path, failing_step):
    run(recipe)  # saved at steps 3, 6 and 8
    expected = read_rows(recipe.run.dir)
    other = elsewhere(recipe, tmp_path / "other")
    shutil.copytree(recipe.run.dir, other.run.dir)
    folder = Path(other.run.dir, "checkpoints")
    back = change(other, run={"resume": str(folder / "step-00000003")})
    failing_step(1)
    with pytest.raises(RuntimeError, match="killed here"):
        run(back)  # in step 5, before anything was saved
    assert [path.name for path in folder.iterdir()] == ["step-00000003"]
    failing_step(10**6)
    run(other)  # goes on at step 3, not at the abandoned step 8
    assert read_rows(other.run.dir) == expected


@pytest.mark.parametrize("free", [{}, {"max_time": 1e6}])  # what may change in any resume
def test_the_command_that_went_back_goes_on_when_it_is_repeated(free, recipe, failing_step, capsys):
    run(recipe)
    folder = Path(recipe.run.dir, "checkpoints")
    slower = change(recipe, optimizer={"learning_rate": 5e-3})
    slower = change(slower, run={"allow_changes": ["optimizer.learning_rate"]})
    back = change(slower, run={"resume": str(folder / "step-00000003")})
    failing_step(4)
    with pytest.raises(RuntimeError, match="killed here"):
        run(back)  # in step 8, after a save at step 6
    failing_step(10**6)
    capsys.readouterr()
    run(change(back, run=free))
    assert "resumed at step 6" in capsys.readouterr().out
    rates = [row["lr"] for row in read_rows(recipe.run.dir) if row["kind"] == "train"]
    assert rates[3:] == [slower.learning_rate()(step) for step in range(3, 8)]


def test_a_run_that_went_back_goes_back_again_with_other_settings(recipe, capsys):
    run(recipe)
    back = change(recipe, run={"resume": f"{recipe.run.dir}/checkpoints/step-00000003"})
    for rate in (5e-3, 1e-3):
        capsys.readouterr()
        allowed = {"allow_changes": ["optimizer.learning_rate"]}
        run(change(back, optimizer={"learning_rate": rate}, run=allowed))
        assert "resumed at step 3" in capsys.readouterr().out


def test_a_fork_goes_on_when_its_parent_has_dropped_the_checkpoint(recipe, tmp_path, capsys):
    run(change(recipe, run={"max_steps": 3}))
    parent = Path(recipe.run.dir, "checkpoints", "step-00000003")
    fork = change(recipe, run={"dir": str(tmp_path / "fork"), "resume": str(parent)})
    run(change(fork, run={"max_steps": 6}))
    shutil.rmtree(parent)
    check_resume(fork)
    capsys.readouterr()
    run(fork)
    assert "resumed at step 6" in capsys.readouterr().out
    typed = change(fork, run={"resume": f"{parent}-typo"})
    with pytest.raises(ValueError, match="is not a whole checkpoint, there is no such folder"):
        check_resume(typed)


@pytest.mark.parametrize("is_fork", [False, True])
@pytest.mark.parametrize("changes", [{"tokens": 512}, {"ramp_from": 128, "ramp_increment": 128}])
def test_steps_of_another_size_are_refused(recipe, tmp_path, changes, is_fork):
    run(change(recipe, run={"max_steps": 4}))
    own = {"allow_changes": [f"batch.{name}" for name in changes]}
    if is_fork:
        own = {"dir": str(tmp_path / "fork"), "resume": recipe.run.dir}
    if "ramp_from" in changes:
        changes = changes | {"ramp_tokens": 512}
    with pytest.raises(ValueError, match=r"batch\.\w+ was .*, is .* keep their size") as error:
        run(change(recipe, batch=changes, run=own))
    assert "run.initial_weights=" in str(error.value)


@pytest.mark.parametrize(
    ("steps", "tokens", "is_fork", "refused"),
    [
        (3, 8, False, "run.max_steps=3 ends the run at step 3"),
        (3, 8, True, "run.max_steps=3 ends the run at step 3"),
        (4, 8, True, "run.max_steps=4 ends the run at step 4"),
        (None, 3, True, "schedule.tokens=768 ends the run at step 3"),
        (None, 3, False, "schedule.tokens=768 ends the run at step 3"),
        (4, 8, False, None),
        (None, 4, False, None),
        (5, 8, True, None),
    ],
)
def test_an_end_before_the_checkpoint_is_refused(recipe, tmp_path, steps, tokens, is_fork, refused):
    run(change(recipe, run={"max_steps": 4}))
    before = read_rows(recipe.run.dir)
    own = {"max_steps": steps, "allow_changes": ["schedule.tokens"]}
    if is_fork:
        own |= {"dir": str(tmp_path / "fork"), "resume": recipe.run.dir}
    short = change(recipe, run=own, schedule={"tokens": tokens * 256})
    if refused is None:
        run(short)
        assert status(short) == {
            "state": "done",
            "step": steps or tokens,
            "reason": f"step {steps or tokens} is reached",
        }
    else:
        with pytest.raises(ValueError, match=refused):
            run(short)
        assert read_rows(recipe.run.dir) == before


def test_changes_are_told_as_users_write_them():
    before = {"a": None, "b": True, "c": ["x", "é"], "d": "text", "e": 0.5, "f": {"g": None}}
    now = {"a": 6.0, "b": False, "c": [], "d": None, "e": 3, "f": {"g": "x"}}
    told = describe_changes(setting_changes(before, now))
    assert len(told) == 6
    for line, (name, old) in zip(told, [*list(before.items())[:5], ("f.g", None)], strict=True):
        written = re.fullmatch(rf"{name} was (.*), is (.*)", line)
        new = now["f"]["g"] if name == "f.g" else now[name]
        assert [yaml.safe_load(text) for text in written.groups()] == [old, new]


@pytest.mark.parametrize("length", [32, 16, 8])
def test_a_fork_with_another_sequence_length_is_as_far_into_the_data(recipe, tmp_path, length):
    begun = change(recipe, run={"max_steps": 4})
    run(begun)
    before = read_state(Path(recipe.run.dir, "checkpoints", "step-00000004"))[0]
    own = {"dir": str(tmp_path / "fork"), "resume": recipe.run.dir}
    fork = change(recipe, run=own, batch={"sequence_length": length, "micro_batch": 1})
    run(fork)
    after = last_state(fork)
    assert after.tokens == 2 * before.tokens == 2 * before.windows * begun.batch.sequence_length
    assert after.windows * length == after.tokens


@pytest.fixture
def array(recipe, prepared, tmp_path, monkeypatch):
    """The recipe with its text as an array of datatrove, beside which the ends of documents are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tokens = open_split(prepared, "train")
    tokens.read(0, len(tokens)).astype("<u2").tofile(tmp_path / "a.ds")
    np.concatenate(list(tokens.iterate_ends())).astype("<u8").tofile(tmp_path / "a.ds.index")
    return change(recipe, data={"path": str(tmp_path / "a.ds"), "validation": "none"})


@pytest.mark.parametrize(
    ("data", "windows"),
    [
        ({"document_masking": True}, 64),
        ({"shuffle": "documents"}, 64),
        ({"packing": "best_fit"}, 64),
        ({}, 64),
        ({"path": "other.bin"}, 32),
    ],
)
def test_a_fork_that_reads_the_same_tokens_otherwise_goes_on_in_them(
    array, tmp_path, data, windows
):
    (np.arange(9000, dtype="<u2") % VOCABULARY).tofile(tmp_path / "other.bin")
    data = {name: str(tmp_path / "other.bin") if name == "path" else data[name] for name in data}
    run(change(array, run={"max_steps": 4}))
    fork = change(array, run={"dir": str(tmp_path / "fork"), "resume": array.run.dir}, data=data)
    run(fork)
    assert last_state(fork).windows == windows


def test_documents_that_end_elsewhere_are_refused_on_resume(array, tmp_path):
    masked = change(array, data={"document_masking": True})
    run(change(masked, run={"max_steps": 4}))
    tokens = (tmp_path / "a.ds").stat().st_size // 2
    np.array([10, tokens], dtype="<u8").tofile(tmp_path / "a.ds.index")
    with pytest.raises(ValueError, match=r"made with other settings \(data was "):
        run(masked)


def test_a_run_that_was_begun_without_an_identity_of_its_data_is_resumed(array, tmp_path):
    masked = change(array, data={"document_masking": True})
    run(masked)
    expected = read_rows(masked.run.dir)
    old = change(masked, run={"dir": str(tmp_path / "old")})
    run(change(old, run={"max_steps": 4}))
    (checkpoint,) = Path(old.run.dir, "checkpoints").glob("step-*4")
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    del manifest["data_identity"]
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    (checkpoint / FILES).write_text(json.dumps(describe_files(checkpoint)))
    run(old)
    assert [r for r in read_rows(old.run.dir) if r["kind"] == "train"] == [
        r for r in expected if r["kind"] == "train"
    ]


def validated(config):
    rows = read_rows(config.run.dir)
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "validation"}


def last_state(config):
    return read_state(Path(config.run.dir, "checkpoints", "step-00000008"))[0]


def make_unreachable(config, step, **more):
    """Write a best loss into a checkpoint that no later one comes below; return its folder."""
    checkpoint = Path(config.run.dir) / "checkpoints" / f"step-{step:08d}"
    state = json.loads((checkpoint / STATE).read_text())
    state |= {"best_loss": 0.5, "best_step": 2} | more
    (checkpoint / STATE).write_text(json.dumps(state))
    (checkpoint / FILES).write_text(json.dumps(describe_files(checkpoint)))
    return checkpoint


@pytest.mark.parametrize(
    "other", [{"validation": {"tokens": 256}}, {"data": {"document_masking": True}}, {}]
)
def test_the_best_loss_is_that_of_the_text_that_is_validated_now(recipe, other):
    begun = change(recipe, run={"max_steps": 4})
    run(begun)
    make_unreachable(begun, 4)
    allowed = {"allow_changes": ["data.document_masking"]}
    run(change(recipe, run=allowed, **other))
    state = last_state(recipe)
    expected = (validated(recipe)[8], 8) if other else (0.5, 2)
    assert (state.best_loss, state.best_step) == expected


def test_another_held_out_text_begins_a_new_best(recipe, tmp_path):
    begun = change(recipe, run={"max_steps": 4})
    run(begun)
    make_unreachable(begun, 4)
    np.save(tmp_path / "held_out.npy", np.arange(2000, dtype=np.uint16) % 500)
    run(change(recipe, data={"validation": str(tmp_path / "held_out.npy")}))
    state = last_state(recipe)
    assert (state.best_loss, state.best_step) == (validated(recipe)[8], 8)


@pytest.mark.parametrize(("tokens", "is_kept"), [(512, True), (256, False)])
def test_a_checkpoint_that_does_not_say_is_taken_to_be_of_the_text_as_set(recipe, tokens, is_kept):
    begun = change(recipe, run={"max_steps": 4})
    run(begun)
    checkpoint = make_unreachable(begun, 4)
    state = json.loads((checkpoint / STATE).read_text())
    del state["validated"]
    (checkpoint / STATE).write_text(json.dumps(state))
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["config"]["data"]["validation"] = "first:100e6"  # as stated, not as the data have it
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    (checkpoint / FILES).write_text(json.dumps(describe_files(checkpoint)))
    run(change(recipe, validation={"tokens": tokens}))
    expected = (0.5, 2) if is_kept else (validated(recipe)[8], 8)
    assert (last_state(recipe).best_loss, last_state(recipe).best_step) == expected


def test_a_fork_has_bests_of_its_own(recipe, tmp_path):
    begun = change(recipe, run={"max_steps": 4})
    run(begun)
    parent = make_unreachable(begun, 4, best_scores={"task/acc": [1.0, 2]})
    fork = change(recipe, run={"dir": str(tmp_path / "fork"), "resume": str(parent)})
    run(fork)
    state, losses = last_state(fork), validated(fork)
    best = min(losses, key=losses.get)
    assert (state.best_loss, state.best_step) == (losses[best], best)
    assert state.best_scores == {}


@pytest.mark.parametrize(
    "shape", [{"width": 64}, {"num_layers": 3}, {"vocabulary_size": 600}, {"context_length": 64}]
)
@pytest.mark.parametrize("is_fork", [False, True])
def test_another_shape_of_the_model_is_refused_with_what_helps(recipe, tmp_path, shape, is_fork):
    begun = change(recipe, run={"max_steps": 1})
    run(begun)
    other = change(begun, model=shape)
    if is_fork:
        other = change(other, run={"dir": str(tmp_path / "fork"), "resume": recipe.run.dir})
    with pytest.raises(ValueError, match=r"its weights do not fit .* another run\.dir") as error:
        run(other)
    assert "allow_changes" not in str(error.value)
    if not is_fork:
        with pytest.raises(ValueError, match="shape"):
            run(change(other, run={"allow_changes": [f"model.{name}" for name in shape]}))


def test_a_fork_is_not_advised_to_be_one(recipe, tmp_path):
    run(change(recipe, run={"max_steps": 1}))
    fork = {"dir": str(tmp_path / "fork"), "resume": recipe.run.dir, "max_steps": 2}
    other = change(recipe, model={"dropout": 0.1}, run=fork)
    with pytest.raises(ValueError, match=r"set them back, or name them in run\.allow_changes$"):
        run(other)
    run(change(other, run={"allow_changes": ["model.dropout"]}))


def test_weights_gathered_in_another_type_are_named(recipe):
    name = "system.fsdp_param_dtype"
    changes = {name: ("fp32", "bf16"), "system.compile": (None, True)}
    assert unsafe_changes(changes, allowed=[]).keys() == {name}
    assert unsafe_changes(changes, allowed=[name]) == {}


def test_the_rule_that_is_recorded_is_that_of_the_data(recipe, capsys):
    """The data of the tests were held out by hash:0.1."""
    begun = change(recipe, data={"validation": "first:100e6"}, run={"max_steps": 1})
    run(begun)
    folder = Path(recipe.run.dir)
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    manifest = json.loads((folder / MANIFEST_OF_RUN).read_text())
    for recorded in (settings, manifest["config"]):
        assert recorded["data"]["validation"] == "hash:0.1"
    run(change(recipe, data={"validation": "hash:0.1"}, run={"max_steps": 2}))
    assert "data.validation was" not in capsys.readouterr().out


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def test_the_revision_is_that_of_the_recipe_and_not_of_the_working_directory(
    recipe, tmp_path, monkeypatch
):
    for name in ("mine", "elsewhere"):
        (tmp_path / name).mkdir()
        git(tmp_path / name, "init", "-q")
        (tmp_path / name / "recipe.py").write_text(name)
        git(tmp_path / name, "add", ".")
        git(tmp_path / name, "commit", "-qm", name)
    corpus = open_corpus(recipe)
    monkeypatch.chdir(tmp_path / "elsewhere")
    revision = git(tmp_path / "mine", "rev-parse", "HEAD").strip()

    def recorded(file):
        monkeypatch.setattr(sys.modules["__main__"], "__file__", str(file), raising=False)
        return build_manifest(recipe, corpus, start_accelerator(recipe))["git"]

    mine = tmp_path / "mine" / "recipe.py"
    assert recorded(mine) == {"revision": revision, "dirty": False}
    mine.write_text("changed")
    assert recorded(mine) == {"revision": revision, "dirty": True}
    (tmp_path / "mine" / ".gitignore").write_text("env/")
    (tmp_path / "mine" / "env").mkdir()
    (tmp_path / "mine" / "env" / "packaged.py").write_text("of an environment")
    assert recorded(tmp_path / "mine" / "env" / "packaged.py") is None
    (tmp_path / "loose.py").write_text("")
    assert recorded(tmp_path / "loose.py") is None


def test_a_longer_schedule_includes_the_phases_that_are_shares_of_it(recipe):
    shares = {"kind": "wsd", "warmup_tokens": None, "warmup_fraction": 0.25, "decay_fraction": 0.5}
    short = change(recipe, schedule=shares)
    run(change(short, run={"max_steps": 4}))
    longer = change(short, schedule={"tokens": 2 * short.schedule.tokens})
    with pytest.raises(ValueError, match=r"schedule\.tokens was"):
        run(longer)
    run(change(longer, run={"allow_changes": ["schedule.tokens"]}))
    rates = [row["lr"] for row in read_rows(recipe.run.dir) if row["kind"] == "train"]
    assert rates[:4] == [short.learning_rate()(step) for step in range(4)]
    assert rates[4:] == [longer.learning_rate()(step) for step in range(4, 16)]
