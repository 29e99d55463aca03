"""Work shared out to processes: in order, bounded, and over when its parent or a worker dies."""

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing import active_children
from pathlib import Path

import pytest

from pretrain_lib import Job, prepare
from pretrain_lib.data import pool
from pretrain_lib.data.pool import count, run_tasks, show_progress
from pretrain_lib.data.prepare.holdout import parse_validation
from pretrain_lib.errors import BAD_INPUT, FAILED, report_errors
from tests.conftest import ROOT, python_path

pytestmark = pytest.mark.moderate

PATIENCE_SECONDS = 120  # for what is to happen at once, on a busy machine

WAIT = """
import signal
import sys
from pathlib import Path
from pretrain_lib.data.pool import run_tasks
from tests.data.test_pool import note_and_wait

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else ignored behind a shell
    list(run_tasks(note_and_wait, [Path(sys.argv[1])] * 2, workers=2))
"""
RUN = """
from pretrain_lib.data.pool import run_tasks, show_progress
if __name__ == "__main__":
    with show_progress("here", total_bytes=1, quiet=True):
        print(sum(run_tasks(abs, range(12), workers=2)))
"""


def square_late(number):
    """Return a square, the first ones last."""
    time.sleep(0.3 if number < 2 else 0)
    return number * number


def note_and_wait(folder):
    (folder / f"{os.getpid()}.pid").touch()
    time.sleep(10 * PATIENCE_SECONDS)


def note_or_fail(path):
    """Fail as the second begins, which takes its time."""
    if path.name == "0":
        wait_until(path.with_name("1 begun").exists)
        raise KeyError("a defect")
    path.with_name(f"{path.name} begun").touch()
    time.sleep(30)
    path.with_name(f"{path.name} ended").touch()


def end_by(number):
    os.kill(os.getpid(), number)
    return "alive"


def count_one(tokens):
    count(source_bytes=2, text_bytes=3, documents=1, tokens=tokens)


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def descendants(pid):
    """Return the processes that a process started, and those that these started."""
    children = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found[1:]


def runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("ahead", [None, 1, 5])
def test_results_come_in_the_order_of_the_tasks(workers, ahead):
    found = list(run_tasks(square_late, range(12), workers=workers, ahead=ahead))
    assert found == [number * number for number in range(12)]


@pytest.mark.parametrize("name", ["pickle", "selectors", "socket"])
def test_scripts_in_the_working_directory_are_not_taken_for_modules(tmp_path, name):
    folder, script = tmp_path / "folder", tmp_path / "run.py"
    folder.mkdir()
    (folder / f"{name}.py").write_text("raise SystemExit('a script of the user')")
    script.write_text(RUN)
    options = {"cwd": folder, "capture_output": True, "text": True}
    run = subprocess.run([sys.executable, script], **options, timeout=PATIENCE_SECONDS)
    assert (run.stdout, run.stderr) == (f"{sum(range(12))}\n", "")


@pytest.mark.parametrize(("workers", "ahead", "most"), [(1, None, 1), (2, 0, 1), (2, 3, 4)])
def test_so_many_tasks_are_begun_before_their_turn_as_asked_for(workers, ahead, most):
    begun = []
    tasks = (begun.append(number) or number for number in itertools.count())
    results = run_tasks(abs, tasks, workers=workers, ahead=ahead)
    for number in range(10):
        assert next(results) == number
        assert len(begun) == number + most
    results.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_their_parent(tmp_path, number):
    (tmp_path / "wait.py").write_text(WAIT)
    run = subprocess.Popen(
        [sys.executable, str(tmp_path / "wait.py"), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": python_path(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    try:
        assert wait_until(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
        workers = {int(path.stem) for path in tmp_path.glob("*.pid")}
        family = descendants(run.pid)
        assert workers <= set(family)
        run.send_signal(number)
        run.wait(PATIENCE_SECONDS)
        wait_until(lambda: not any(map(runs, family)))
        assert [pid for pid in family if runs(pid)] == []
    finally:
        run.kill()  # with it the others, or so the test says


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_workers_survive_the_signals_that_end_programs_only_if_asked_to(number):
    assert list(run_tasks(end_by, [number], workers=2, survive_signals=True)) == ["alive"]
    with pytest.raises(RuntimeError, match="one of 2 worker processes ended"):
        list(run_tasks(end_by, [number], workers=2))


def test_a_worker_that_is_killed_is_told_and_leaves_none_behind():
    before = set(active_children())
    with pytest.raises(RuntimeError, match="one of 2 worker processes .*with fewer workers"):
        list(run_tasks(end_by, [0, signal.SIGKILL, 0, 0], workers=2, survive_signals=True))
    assert set(active_children()) == before


def test_an_exception_ends_the_tasks_that_are_begun_and_cancels_the_others(tmp_path):
    before = set(active_children())
    with pytest.raises(KeyError, match="a defect"):
        list(run_tasks(note_or_fail, [tmp_path / str(i) for i in range(200)], workers=2))
    assert set(active_children()) == before
    names = {path.name for path in tmp_path.iterdir()}
    assert {"1 begun"} <= names <= {"1 begun", "2 begun"}


def test_a_reader_that_stops_early_ends_the_workers(tmp_path):
    before = set(active_children())
    for result in run_tasks(square_late, range(10_000), workers=2):
        assert result == 0
        break
    assert wait_until(lambda: set(active_children()) == before)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_mistake_found_by_a_worker_is_told_in_one_line(capsys, workers):
    def act():
        list(run_tasks(parse_validation, ["none", "hash:7"], workers=workers))

    assert report_errors(act) == BAD_INPUT
    error = capsys.readouterr().err
    assert error.startswith("error: data.validation=hash:7 must be hash, hash:SHARE")
    assert error.count("\n") == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_a_defect_in_a_worker_keeps_its_traceback(workers, capsys, tmp_path, monkeypatch):
    def act():
        list(run_tasks(json.loads, ["1", "{"], workers=workers))

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert report_errors(act) == FAILED
    *traceback, last = capsys.readouterr().err.splitlines()
    assert "Traceback" in traceback[0] and "Expecting property name" in "\n".join(traceback)
    (log,) = tmp_path.glob("pretrain-error-*.log")
    assert last.startswith("error: JSONDecodeError, which is unexpected: the traceback is in ")
    assert str(log) in last and last.endswith("/issues")
    assert log.read_text().splitlines() == traceback


@pytest.mark.parametrize("workers", [1, 2])
def test_what_workers_count_adds_up(workers):
    with show_progress("counting", total_bytes=100, quiet=True):
        list(run_tasks(count_one, range(20), workers=workers))
        assert list(pool._counters) == [40, 60, 20, 190]
    count_one(1)  # without a bar: nothing to add to


def test_off_a_terminal_a_line_now_and_then_shows_how_far_it_has_come(monkeypatch, capsys):
    monkeypatch.setattr(pool, "REFRESH_SECONDS", 0.01)
    monkeypatch.setattr(pool, "LINE_SECONDS", 0)
    shown = []
    for quiet in (False, True):
        shown.append("")
        with show_progress("preparing", total_bytes=200, done_bytes=50, quiet=quiet):
            count(source_bytes=100, text_bytes=10, documents=1234, tokens=56_789)

            def line_is_there(shown=shown):
                shown[-1] += capsys.readouterr().err
                return "\n" in shown[-1]

            wait_until(line_is_there) if not quiet else time.sleep(0.2)
    assert shown[0].startswith("preparing: 75%, 1,234 documents, 56,789 tokens, ")
    assert shown[1] == ""


def test_progress_counts_text_in_bytes(tmp_path, monkeypatch):
    text = "字" * 1000
    (tmp_path / "a.txt").write_text(text)
    counted = []
    monkeypatch.setattr(
        "pretrain_lib.data.prepare.groups.count", lambda **amounts: counted.append(amounts)
    )
    job = Job((str(tmp_path / "a.txt"),), train_tokenizer=300, validation="none")
    prepare(job, tmp_path / "out", workers=1, quiet=True)
    assert sum(amounts.get("text_bytes", 0) for amounts in counted) == len(text.encode())
