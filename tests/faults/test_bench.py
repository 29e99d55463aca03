"""The fault bench at places drawn at random: nothing lost, broken, left behind or unclear."""

import errno
import os
import random
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.faults.bench import KINDS, Bench, Report, contents, draw, unclear
from tests.faults.scenarios import SCENARIOS

PLACES = 60
COMPILER = shutil.which("cc") or shutil.which("gcc")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="no C compiler, which the fault bench needs"),
    pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the shim is for Linux"),
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    opened = Bench(tmp_path_factory.mktemp("bench"))
    for scenario in SCENARIOS:
        opened.learn(scenario)
    yield opened
    opened.close()


def test_faults_at_places_drawn_at_random_lose_nothing(bench):
    seed = int(os.environ.get("FAULTS_SEED") or random.SystemRandom().randrange(10**6))
    print(f"FAULTS_SEED={seed}")  # which pytest shows if the test fails
    report = Report()
    for place in draw(bench, PLACES, seed):
        bench.strike(*place, report)
    assert report.tried >= PLACES - 3  # some operations are not in every run
    found = {name: value for name, value in asdict(report).items() if name != "tried"}
    nothing = {name: [] for name in found if name != "survived"}
    assert found == {"survived": report.tried} | nothing, f"FAULTS_SEED={seed}"


def test_every_scenario_has_what_is_to_be_struck(bench):
    kinds = {scenario: {call for call, _ in calls} for scenario, calls in bench.calls.items()}
    assert all({"create", "write", "fsync", "rename"} <= found for found in kinds.values())
    assert "unlink" in kinds["resume, save, prune"]  # the checkpoint before
    assert all(len(bench.places(s, "short")) < len(bench.places(s, "kill")) for s in kinds)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_flock_commands_do_what_they_do(bench, number):
    for scenario in ("first start, save", "resume, save, prune", "prepare", "spool"):
        root = bench.new_root(scenario)
        environment = {"FAULTS_FLOCK": str(number)}  # read by the shim
        assert bench.run(scenario, root, environment=environment) == 0, bench.console.read_text()
        assert contents(root) == bench.expected[scenario]


def test_rows_before_a_checkpoint_survive_a_power_cut_after_it(bench):
    """The first save is the last before which nothing flushes the names of the files of rows."""
    scenario, report = "first start, save", Report()
    calls = [(call, Path(path).name) for call, path in bench.calls[scenario]]
    commit = calls.index(("rename", "step-00000002"))
    for place in range(commit + 2, commit + 8):  # from the flush of its name on
        bench.strike(scenario, "power cut", place, report)
    assert (report.tried, report.survived) == (6, 6), report


@pytest.mark.parametrize("first", [1, 5])
def test_a_run_that_cannot_read_its_tokens_says_so_and_goes_on_when_it_can(bench, first):
    scenario = "resume, save, prune"
    root = bench.new_root(scenario)
    environment = {"FAULTS_READ": f"{first}:.bin"}  # read by the shim
    assert bench.run(scenario, root, environment=environment) == 1
    *_, line = bench.console.read_text().strip().splitlines()
    assert line.startswith("error: [Errno 5] Input/output error: ") and ".bin" in line
    assert list(unclear(root, 1, bench.console.read_text())) == []
    assert bench.run(scenario, root) == 0
    assert contents(root) == bench.expected[scenario]


def test_what_is_wrong_is_found(bench, monkeypatch):
    """What is lost, left or different after a kill is reported: here by another expectation."""
    scenario = "prepare"
    monkeypatch.setitem(
        bench.expected,
        scenario,
        {k: v + "!" for k, v in bench.expected[scenario].items() if k != "data/job.json"},
    )
    report = Report()
    bench.strike(scenario, KINDS[0], 5, report)
    assert (report.tried, report.survived) == (1, 0)
    assert "data/job.json" in report.left[0] and "prepare, kill at 5" in report.left[0]
    assert len(report.different) == 1
