"""Pictures of runs: nothing read is dropped, the averages are right, the files are there."""

import json
import struct
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from pretrain_lib.report import column, plot_runs, read_metrics, smooth


def write_run(folder: Path, *, steps: int = 60, final: float = 3.0, **changes) -> list[dict]:
    """Write a run's metrics.jsonl and return its rows."""
    rows = []
    for step in range(steps + 1):
        common = {"step": step, "tokens": step * 1024}
        loss = final + 7 * 0.8**step
        if step % 20 == 0:
            scores = {"loss": loss, "perplexity": float(np.exp(loss)), "bits_per_byte": None}
            rows.append({"kind": "validation", **common, **scores})
        if step:
            train = {"loss": loss, "lr": 1e-3 / step, "grad_norm": 1 / step, "mfu": None}
            speed = {"tokens_per_second": 5e4, "seconds": 0.02}
            rows.append({"kind": "train", **common, **train, **speed, **changes})
    rows.append({"kind": "event", "step": steps, "tokens": steps * 1024, "event": "done"})
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text)
    return rows


def test_reading_drops_nothing(tmp_path):
    rows = write_run(tmp_path / "run")
    assert read_metrics(tmp_path / "run") == rows
    tokens, losses = column(rows, "train", "loss")
    assert tokens.tolist() == [1024.0 * step for step in range(1, 61)]
    assert losses.tolist() == [row["loss"] for row in rows if row["kind"] == "train"]
    assert len(column(rows, "validation", "loss")[0]) == 4
    assert np.isnan(column(rows, "validation", "bits_per_byte")[1]).all()


def test_a_line_that_is_still_being_written_is_left_out(tmp_path):
    rows = write_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert read_metrics(tmp_path) == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no metrics.jsonl"),
        ("", "no train row"),
        ('{"kind": "validation", "step": 0, "tokens": 0, "loss": 9.0}\n', "no train row"),
        ('{"kind": "train"\n', "line 1 is not JSON"),
    ],
)
def test_a_run_without_metrics_is_refused_and_nothing_written(tmp_path, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        plot_runs([tmp_path])
    assert not (tmp_path / "plots").exists()


def test_no_run_is_refused():
    with pytest.raises(ValueError, match="at least one run"):
        plot_runs([])


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
@pytest.mark.parametrize("window", [1, 4, 5, 60])
def test_the_average_is_that_of_the_values_around(window):
    values = np.random.default_rng(0).normal(size=41)
    values[[3, 17]] = np.nan
    before, after = window // 2, (window - 1) // 2
    expected = [np.nanmean(values[max(0, i - before) : i + after + 1]) for i in range(41)]
    np.testing.assert_allclose(smooth(values, window), expected)


def test_one_picture_in_two_formats_in_the_run_folder(tmp_path):
    write_run(tmp_path / "run")
    before = dict(matplotlib.rcParams)
    paths = plot_runs([tmp_path / "run"])
    plots = tmp_path / "run" / "plots"
    assert paths == [plots / "curves.png", plots / "curves.svg"]
    assert struct.unpack(">II", paths[0].read_bytes()[16:24]) == (1500, 1050)
    assert ElementTree.parse(paths[1]).getroot().get("viewBox") == "0 0 720 504"
    assert dict(matplotlib.rcParams) == before


def test_the_same_runs_give_the_same_bytes(tmp_path):
    for name in "ab":
        write_run(tmp_path / name, final=3.0 + (name == "b"))
    runs = [tmp_path / "a", tmp_path / "b"]
    first = [path.read_bytes() for path in plot_runs(runs, tmp_path / "v1.5" / "both.png")]
    second = [path.read_bytes() for path in plot_runs(runs, tmp_path / "again.v2")]
    assert first == second
    assert sorted(path.name for path in tmp_path.glob("*/both.*")) == ["both.png", "both.svg"]
    assert sorted(path.name for path in tmp_path.glob("again*")) == ["again.v2.png", "again.v2.svg"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("changes", [{}, {"grad_norm": None, "loss": None}, {"loss": float("nan")}])
def test_a_run_of_one_step_or_without_values_is_drawn(tmp_path, changes):
    write_run(tmp_path, steps=1, **changes)
    assert all(path.stat().st_size > 10_000 for path in plot_runs([tmp_path]))


def test_importing_it_does_not_import_matplotlib():
    code = "import sys, pretrain_lib.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
