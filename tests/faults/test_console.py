"""A run outlives its terminal, the reader of its output, and streams that were closed."""

import os
import pty
import signal
import subprocess
import time

import pytest

from pretrain_lib.run_folder.status import read_status
from tests.conftest import ROOT, python_path, read_rows
from tests.faults import scenarios
from tests.forks import forked_python

pytestmark = pytest.mark.slow
RUN = """
import os, signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests were started by nohup
from pathlib import Path
from tests.faults import scenarios
from pretrain_lib.training import loop
given, run, seconds, *flags = sys.argv[1:]
step = loop._step
def slow(*parts):
    time.sleep(float(seconds))
    return step(*parts)
loop._step = slow
if flags:
    for number in (0, 1, 2):
        os.close(number)
    sys.stdin = sys.stdout = sys.stderr = None
sys.exit(scenarios.train_tiny(Path(given), Path(run)))
"""


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """What a run starts from, and the rows of one that nothing happened to."""
    folder = tmp_path_factory.mktemp("console") / "given"
    scenarios.make_data(folder)
    return folder


def start(given, run, *flags, seconds=0.0, **options):
    """Start a run of four steps, each of so many seconds; with `--closed`, without streams."""
    environment = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "true"}
    environment |= {"PYTHONPATH": python_path(ROOT), "OMP_NUM_THREADS": "1"}
    command = [forked_python(), "-c", RUN, given, run, seconds, *flags]
    return subprocess.Popen(
        [str(word) for word in command], cwd=ROOT, env=os.environ | environment, **options
    )


def await_checkpoint(process, run):
    deadline = time.monotonic() + 300
    while not list(run.glob("checkpoints/step-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def steps(run):
    return [row["step"] for row in read_rows(run) if row["kind"] == "train"]


def test_a_run_goes_on_when_the_reader_of_its_output_has_gone(given, tmp_path):
    reading, writing = os.pipe()
    process = start(given, tmp_path / "run", stdout=writing, stderr=writing)
    os.close(writing)
    os.close(reading)  # as `head` does
    assert process.wait() == 0
    assert read_status(tmp_path / "run")["state"] == "done"
    assert steps(tmp_path / "run") == [1, 2, 3, 4]


def test_a_run_goes_on_without_any_stream(given, tmp_path):
    assert start(given, tmp_path / "run", "--closed").wait() == 0
    assert read_status(tmp_path / "run")["state"] == "done"
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [path for path in files if b"next command" in path.read_bytes()]


def test_a_run_whose_terminal_is_closed_is_saved_and_goes_on(given, tmp_path):
    outer, inner = pty.openpty()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), inner)
    process = start(given, tmp_path / "run", seconds=0.5, start_new_session=True, **streams)
    os.close(inner)
    await_checkpoint(process, tmp_path / "run")
    os.close(outer)
    process.send_signal(signal.SIGHUP)  # as the kernel does to the session of a terminal
    assert process.wait() == 75
    status = read_status(tmp_path / "run")
    assert status["state"] == "resumable" and "SIGHUP" in status["reason"]
    assert start(given, tmp_path / "run", stdout=subprocess.DEVNULL).wait() == 0
    assert steps(tmp_path / "run") == [1, 2, 3, 4]
