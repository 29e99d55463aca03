"""Kills in every phase of a save lose nothing and leave nothing broken; planted faults are seen."""

import functools
import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from pretrain_lib.checkpoint import folders as checkpoint_files
from pretrain_lib.checkpoint import state as checkpoint
from pretrain_lib.checkpoint.folders import FILES, checkpoint_path
from pretrain_lib.models.weight_files import WEIGHTS
from pretrain_lib.tensors import piece_files
from tests.checkpoint.test_checkpoint import GPT2_SHAPE, build, build_adamw, save, steps
from tests.conftest import run_python
from tests.faults.kills import (
    COMMITTED,
    FLUSHING,
    OPTIMIZER,
    PHASES,
    Report,
    check_what_is_left,
    inject,
    locate,
    look_at_start,
)

INJECT = "from tests.checkpoint.test_faults import print_report; print_report({!r}, {!r}, **{!r})"


def sabotage(function):
    """Let something happen before and after the commit of a checkpoint that is on the disk.

    Not in the run that shows how the checkpoints ought to be.
    """
    flush, commit = checkpoint_files.flush_to_disk, checkpoint.commit_staged

    def flush_and_more(folder):
        flush(folder)
        if "reference" not in folder.parts:
            function(folder, committed=False)

    def commit_and_more(staging, target):
        commit(staging, target)
        if "reference" not in target.parts:
            function(target.parent, committed=True)

    checkpoint_files.flush_to_disk = flush_and_more
    checkpoint.commit_staged = commit_and_more


def prune_too_early(folder, *, committed):
    if not committed:
        for path in folder.parent.glob("step-*"):
            shutil.rmtree(path.rename(path.with_name(f".{path.name}.old")))
        time.sleep(0.1)


def finish_too_late(folder, *, committed):
    if committed:
        files = max(folder.glob("step-*")) / FILES
        files.rename(files.with_suffix(".late"))
        time.sleep(0.1)
        files.with_suffix(".late").rename(files)


def print_report(folder, prepared, *, fault=None, **options):
    """Print what `inject` reports, of a saver with a fault if one is named."""
    if fault:
        sabotage(globals()[fault])
    report = inject(Path(folder), Path(prepared), **options)
    print(json.dumps(asdict(report) | {"within_save": report.within_save}))


def inject_in_process(folder, prepared, **options):
    """Return the report of `inject`, called in a process that has computed nothing."""
    code = INJECT.format(str(folder), str(prepared), options)
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_kills_in_every_phase_of_a_save_lose_nothing(prepared, tmp_path):
    report = inject_in_process(tmp_path, prepared, kills=25, seed=0)
    assert report["kills"] == sum(report["phases"].values()) == 25
    assert report["within_save"] >= 13
    assert len([name for name in PHASES[:6] if report["phases"][name]]) >= 3
    found = {name: report[name] for name in ("lost", "broken", "accepted_broken", "different")}
    assert found == {"lost": [], "broken": [], "accepted_broken": [], "different": []}
    assert report["chains"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "phase", "reported", "text"),
    [
        ("prune_too_early", FLUSHING, "lost", "checkpoints/step-"),
        ("finish_too_late", COMMITTED, "broken", "training/files.json: missing"),
    ],
)
def test_a_saver_with_a_fault_is_caught(prepared, tmp_path, fault, phase, reported, text):
    report = inject_in_process(tmp_path, prepared, kills=4, aims=(phase,), fault=fault)
    assert any(text in line for line in report[reported])


@pytest.fixture
def trained():
    """A tiny model and its optimizer, after a step."""
    model = build(GPT2_SHAPE)
    optimizer = build_adamw(model, learning_rate=1e-2)
    steps(model, optimizer, range(1))
    return model, optimizer


def test_the_phases_are_those_of_a_real_save(trained, tmp_path, monkeypatch):
    for step in (2, 4):
        save(tmp_path, step, *trained)
    seen = []

    def look_before(module, name):
        function = getattr(module, name)

        @functools.wraps(function)
        def looking(*arguments, **options):
            sight = locate(tmp_path, start)
            seen.append((name, sight.step, PHASES[sight.phase]))
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, looking)

    for name in ("remove_leftovers", "write_json", "prune"):
        look_before(checkpoint, name)
    look_before(piece_files, "write_tensors")
    look_before(checkpoint_files, "flush_to_disk")
    with look_at_start(tmp_path) as start:
        look_before(shutil, "rmtree")
        save(tmp_path, 6, *trained, keep_last=2)
    assert seen == [
        ("remove_leftovers", 4, "before the first save"),
        ("write_tensors", 6, "staging"),
        ("write_json", 6, "writing tensors"),
        ("write_json", 6, "listing files"),
        ("write_json", 6, "listing files"),
        ("flush_to_disk", 6, "flushing"),
        ("prune", 6, "committed, not pruned"),
        ("remove_leftovers", 6, "pruning"),
        ("rmtree", 6, "pruning"),
    ]


def test_what_an_earlier_kill_has_left_is_no_save(tmp_path):
    for name in (".step-00000004.tmp", ".step-00000002.old", "step-00000003"):
        (tmp_path / name).mkdir()
    with look_at_start(tmp_path) as start:
        assert locate(tmp_path, start)[:2] == (3, PHASES.index("before the first save"))
        (tmp_path / ".step-00000004.tmp").rmdir()
        (tmp_path / ".step-00000004.tmp").mkdir()  # of the same name, by the run itself
        assert locate(tmp_path, start)[:2] == (4, PHASES.index("staging"))


@pytest.fixture
def killed(trained, tmp_path):
    """Checkpoints of three steps, and where the same of a run lie that was not killed."""
    for step in (2, 4, 6):
        save(tmp_path / "expected", step, *trained)
    shutil.copytree(tmp_path / "expected", tmp_path / "killed")
    return tmp_path / "killed", tmp_path / "expected"


def look(killed, *, seen=()):
    report = Report()
    check_what_is_left(killed[0], {f"step-{step:08d}" for step in seen}, killed[1], report)
    lost = [Path(path).name for path in report.lost]
    return lost, report.broken, [Path(path).name for path in report.accepted_broken]


def test_whole_checkpoints_are_neither_lost_nor_broken(killed):
    assert look(killed, seen=(2, 4)) == ([], [], [])
    shutil.rmtree(checkpoint_path(killed[0], 2))  # obsolete after 6
    assert look(killed, seen=(2, 4)) == ([], [], [])


def test_a_checkpoint_that_was_to_be_kept_is_missed(killed):
    for step in (2, 6):
        shutil.rmtree(checkpoint_path(killed[0], step))
    assert look(killed, seen=(2, 4)) == (["step-00000002"], [], [])
    assert look(killed, seen=(2, 4, 6)) == (["step-00000006"], [], [])


@pytest.mark.filterwarnings("ignore:skipping a damaged checkpoint")
@pytest.mark.parametrize("file", [WEIGHTS, OPTIMIZER, "config.json", FILES])
def test_a_committed_folder_with_a_flipped_byte_is_broken(killed, file, monkeypatch):
    path = checkpoint_path(killed[0], 6) / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    lost, broken, accepted = look(killed)
    assert lost == ["step-00000006"]
    assert any("step-00000006" in line for line in broken)
    assert accepted == []
    monkeypatch.setattr(checkpoint_files, "find_newest", lambda folder: checkpoint_path(folder, 6))
    assert look(killed)[2] == ["step-00000006"]


def test_whole_files_of_another_run_are_broken(killed, trained):
    steps(*trained, range(1, 2))
    shutil.rmtree(checkpoint_path(killed[0], 6))
    path = save(killed[0], 6, *trained)
    reason = "not that of the run that was not killed"
    broken = [f"{path / file}: {reason}" for file in (WEIGHTS, OPTIMIZER)]
    assert look(killed) == (["step-00000006"], broken, ["step-00000006"])
