"""A profile holds the steps asked for, and leaves the run as it is."""

import gzip
import json

import pytest

from tests.conftest import change, read_rows
from tests.training.test_loop import run


def test_a_profile_is_of_the_steps_asked_for_and_changes_no_curve(recipe, tmp_path, capsys):
    plain = change(recipe, run={"dir": str(tmp_path / "plain")})
    profiled = change(recipe, run={"dir": str(tmp_path / "profiled")}, system={"profile": (3, 4)})
    run(plain)
    capsys.readouterr()
    run(profiled)
    assert read_rows(tmp_path / "plain") == read_rows(tmp_path / "profiled")
    (trace,) = (tmp_path / "profiled" / "profile").iterdir()
    assert trace.name == "steps-3-4.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    updates = [e for e in events if e.get("name", "").startswith("Optimizer.step")]
    assert len(updates) == 2
    said = capsys.readouterr().out
    assert f"wrote {trace}" in said
    heading = next(line for line in said.splitlines() if line.startswith("operator"))
    assert heading.split() == ["operator", "calls/step", "CPU", "ms/step", "share"]
    assert not (tmp_path / "plain" / "profile").exists()


def test_steps_in_the_wrong_order_are_refused(recipe):
    with pytest.raises(ValueError, match=r"system\.profile=\[4, 3\]: the first step"):
        change(recipe, system={"profile": (4, 3)}).check(processes=1)
