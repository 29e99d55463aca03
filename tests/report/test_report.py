"""Reports: what they say of whole, broken and unfinished runs, and how a browser shows them."""

import fcntl
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pretrain_lib import GPT2, open_corpus, start_accelerator, train
from pretrain_lib.report import facts
from pretrain_lib.report.changes import changed_settings, differences, format_value
from pretrain_lib.report.charts import thin
from pretrain_lib.report.facts import cost_facts, device_hours, state_of
from pretrain_lib.report.report import write_report
from pretrain_lib.report.runs import open_runs
from pretrain_lib.run_folder.folder import open_run_folder, write_recipe
from pretrain_lib.run_folder.metrics import human, human_time
from pretrain_lib.run_folder.rows import mean_mfu
from tests.conftest import change
from tests.report.test_pictures import write_run

pytestmark = pytest.mark.moderate

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
HOSTILE = "</script><script>document.title = 'taken over'</script><b>|`"
WORLD = {
    "device": "cuda",
    "device_name": "NVIDIA H100",
    "processes": 8,
    "precision": "no",
    "distributed": "MULTI_GPU",
    "threads": 1,
    "system": "Linux",
}


def write_all(folder, **rows):
    """Write a run with every file that a report reads."""
    write_run(folder, **rows)
    model = {"vocabulary_size": 8192, "num_layers": 2, "width": 64, "num_heads": 2}
    config = {"model": model, "data": {"path": "x"}, "batch": {"sequence_length": 64}}
    starts = [{"step": 0, "time": "2026-01-01", "processes": 8}]
    starts += [{"step": 30, "time": "2026-01-02", "processes": 1}]
    manifest = {"config": config, "world": WORLD, "starts": starts, "versions": {"torch": "2.13"}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "status.json").write_text(json.dumps({"state": "done", "reason": "end"}))
    samples = [{"step": s, "prompt": "def ", "text": HOSTILE} for s in range(0, 61, 3)]
    text = "".join(json.dumps(sample) + "\n" for sample in samples)
    (folder / "samples.jsonl").write_text(text + '{"step": 4')
    return folder


def texts(page):
    """Return the text of an HTML page without its scripts, as a reader sees it."""
    body = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", " ", body))


def test_the_report_of_a_trained_run(recipe, tmp_path):
    config = change(recipe, run={"max_steps": 6})
    with open_run_folder(tmp_path / "run", resume="auto"):
        write_recipe(tmp_path / "run", recipe)
    for each in (change(recipe, run={"max_steps": 4}), config):  # the second goes on
        corpus = open_corpus(each)
        train(each, GPT2(each.model).initialize(0), corpus, start_accelerator(each))
    folder = tmp_path / "run"
    paths = write_report([folder], watts=100)
    names = ["report.html", "report.md", "report-curves.png"]
    assert paths == [folder / name for name in names]
    page, twin = texts(paths[0].read_text()), paths[1].read_text()
    manifest = json.loads((folder / "manifest.json").read_text())
    starts = [(start["step"], start["processes"]) for start in manifest["starts"]]
    assert starts == [(0, 1), (4, 1)]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").open()]
    assert [sample["step"] for sample in samples] == [4, 6]
    for said in (page, twin):
        assert "2 settings differ from the recipe" in said and "run.max_steps" in said
        assert "data.validation" in said and "hash:0.1" in said  # as the data were prepared
        assert "done: step 6 is reached" in said and "kWh at 100 W per device" in said
        assert "No scores have been measured." in said
        assert manifest["data_fingerprint"] in said and "bits per byte)" in said
        assert "1 resume." in said
        assert all(sample["text"].splitlines()[0] in said for sample in samples)
    assert "![Curves](report-curves.png)" in twin


def test_scores_stand_beside_published_ones_with_items_and_errors(tmp_path):
    folder = write_all(tmp_path / "run")
    results = {
        "results": {"arc_easy": {"acc,none": 0.5, "acc_stderr,none": 0.05}},
        "n-shot": {"arc_easy": 0},
        "n-samples": {"arc_easy": {"original": 2376, "effective": 100}},
        "config": {"model_args": {"pretrained": "run/checkpoints/step-1"}},
        "lm_eval_version": "0.4.13",
    }
    (folder / "scores.json").write_text(json.dumps(results))
    write_report([folder])
    lines = (folder / "report.md").read_text().splitlines()
    (row,) = [line for line in lines if line.startswith("| arc_easy | acc |")]
    assert row.startswith("| arc_easy | acc | 100 | 0 | 0.5000 ± 0.0500 |") and "0.4352" in row
    (row,) = [line for line in lines if line.startswith("| hellaswag | acc_norm |")]
    assert "| 0.3000 ± 0.0046 | 0.3114 a |" in row
    (intro,) = [line for line in lines if line.startswith("Value ± standard error.")]
    assert "during training, at step 60." in intro and "from scores.json of run/check" in intro


def test_events_are_counted_with_the_right_number(tmp_path):
    folder = write_all(tmp_path / "run")
    text = "".join(path.read_text() for path in write_report([folder])[1:2])
    assert "1 resume, 1 update left out, 1 rollback, 1 new." in text
    assert "| 30 | resumed | at 2026-01-02, 1 device |" in text
    assert "Samples at 12 of 21 steps" in text


def test_a_stretch_counts_with_its_own_number_of_devices(tmp_path):
    folder = write_all(tmp_path / "run")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    for row in rows:
        row["seconds"] = 60.0 * row["step"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run,) = open_runs([folder])
    assert device_hours(run) == pytest.approx(0.5 * 8 + 0.5 * 1)


def timed_run(folder, steps, *, starts, parent=None, begun=0.0):
    """Write a run of `(tokens, seconds, peak share per token/s)` steps, and open it."""
    rows, tokens, seconds = [], 1000 * starts[0][0], begun
    first = {"tokens": tokens, "seconds": seconds}
    for number, (size, took, share) in enumerate(steps, start=starts[0][0] + 1):
        tokens, seconds = tokens + size, seconds + took
        row = {"kind": "train", "step": number, "tokens": tokens, "loss": 1.0, "lr": 1e-3}
        row |= {"tokens_per_second": size / took, "mfu": share * size / took, "targets": 1}
        rows.append(row | {"grad_norm": 1.0, "seconds": seconds, "peak_memory_bytes": 1})
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    started = [{"step": step, "processes": n, "time": ""} for step, n in starts]
    started[0] |= first
    world = {"processes": starts[-1][1]}
    manifest = {"config": {}, "world": world, "starts": started, "parent": parent}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (run,) = open_runs([folder])
    return run


@pytest.mark.parametrize("parent", [None, "parent"])
@pytest.mark.parametrize(
    "steps",
    [
        [(1000, 99.0, 4e-4)] + 9 * [(1000, 1.0, 4e-4)],  # compiled in the first
        5 * [(100, 1.0, 2e-4)] + 5 * [(10_000, 5.0, 2e-4)],  # a batch that grows
    ],
)
def test_the_cost_is_that_of_all_own_tokens_in_all_the_own_time(
    tmp_path, monkeypatch, steps, parent
):
    starts = [(0 if parent is None else 50, 1)]
    run = timed_run(tmp_path / "run", steps, starts=starts, parent=parent, begun=7.0)
    tokens, seconds, share = sum(s[0] for s in steps), sum(s[1] for s in steps), steps[0][2]
    assert mean_mfu(run.rows, run.manifest) == pytest.approx(share * tokens / seconds)
    monkeypatch.setattr(facts, "flops_per_token", lambda _: 0.5)
    assert cost_facts(run, watts=1000) == {
        "Time in training steps": human_time(seconds),
        "Device hours": f"{seconds / 3600:.3g} h",
        "Energy": f"{seconds / 3600:.3g} kWh at 1000 W per device",
        "Speed": f"{human(tokens / seconds)} tokens per second",
        "Model FLOPs": f"{0.5 * tokens:.3g}".replace("e+", "e"),
        "FLOPs utilization (MFU)": f"{share * tokens / seconds:.1%}",
    }


@pytest.mark.parametrize(
    ("starts", "parent", "devices_of_steps"),
    [
        ([(0, 1), (40, 8)], None, 40 * [1] + 60 * [8]),
        ([(0, 1), (90, 8), (50, 2)], None, 50 * [1] + 50 * [2]),  # went back to step 50
        ([(0, 1), (30, 4), (90, 8), (50, 2)], None, 30 * [1] + 20 * [4] + 50 * [2]),
        ([(200, 8)], "parent", 100 * [8]),
        ([(200, 8), (240, 1)], "parent", 40 * [8] + 60 * [1]),
    ],
)
def test_device_hours_are_those_of_the_run_itself(tmp_path, starts, parent, devices_of_steps):
    begun = 0.0 if parent is None else 7200.0
    steps = 100 * [(1000, 36.0, 1e-4)]
    run = timed_run(tmp_path / "run", steps, starts=starts, parent=parent, begun=begun)
    expected = 36.0 * sum(devices_of_steps) / 3600
    assert device_hours(run) == pytest.approx(expected)
    assert cost_facts(run, watts=700)["Energy"].startswith(f"{expected * 0.7:,.3g} kWh")


def test_a_run_that_was_killed_is_told_from_one_that_is_running(tmp_path):
    folder = write_all(tmp_path / "run")
    (folder / "status.json").write_text(json.dumps({"state": "running", "step": 4}))
    (folder / ".lock").write_text("")
    (run,) = open_runs([folder])
    assert state_of(run)[0] == "killed"
    with (folder / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert state_of(run)[0] == "running"


@pytest.mark.parametrize("text", ["", '{"kind": "validation", "step": 0, "tokens": 0}\n{"ki'])
def test_a_run_without_a_step_has_a_report(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    paths = write_report([tmp_path])
    assert [path.name for path in paths] == ["report.html", "report.md"]
    said = paths[1].read_text()
    for sentence in (
        "No training step is logged yet",
        "No scores have been measured.",
        "No samples have been written.",
        "The settings are unknown: there is no manifest.json.",
    ):
        assert sentence in said


def test_several_runs_are_set_side_by_side(tmp_path):
    runs = [write_all(tmp_path / "a"), write_all(tmp_path / "b", final=2.0)]
    manifest = json.loads((runs[1] / "manifest.json").read_text())
    manifest["config"]["optimizer"] = {"learning_rate": 1.0}
    manifest["world"] |= {"processes": 1}
    (runs[1] / "manifest.json").write_text(json.dumps(manifest))
    table = differences(open_runs(runs))
    assert table.header == ("", "a", "b")
    assert set(table.rows) == {("optimizer.learning_rate", "", "1"), ("world.processes", "8", "1")}
    html_page, twin, picture = write_report(runs, tmp_path / "out" / "both.html")
    assert [p.name for p in (html_page, twin, picture)] == [
        *("both.html", "both.md", "both-curves.png")
    ]
    said = twin.read_text()
    assert said.startswith("# a · b\n\n2 runs side by side\n")
    assert "## Differences between the runs" in said and "a: 2 settings differ" not in said


def test_without_a_recipe_the_library_is_compared_with(tmp_path):
    (run,) = open_runs([write_all(tmp_path / "run")])
    source, table = changed_settings(run)
    assert source == "the defaults of the library"
    assert ("model.num_layers", "12", "2") in table.rows
    assert ("model.vocabulary_size", "50,257 ids", "8,192 ids") in table.rows


def test_values_have_units_in_the_right_number():
    assert format_value(1, "steps") == "1 step" and format_value(1, "processes") == "1 process"
    assert format_value(1_250_000, "tokens") == "1,250,000 tokens"
    assert [format_value(v) for v in (None, True, 6e-4, ["a"])] == [
        "null",
        "true",
        "0.0006",
        '["a"]',
    ]


def test_long_curves_keep_their_extremes():
    import numpy as np

    values = np.random.default_rng(0).normal(size=100_000)
    values[[7, 99_990]] = [50.0, np.nan]
    kept = thin(values, 2000)
    assert len(kept) <= 2002 and 7 in kept and np.nanargmin(values) in kept
    assert kept[0] == 0 and kept[-1] == 99_999 and (np.diff(kept) > 0).all()


def dump(page, tmp_path):
    """Return the DOM of a page after its scripts have run in a headless browser, and its errors."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium is installed to look at the page (apt-get install chromium)")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000"]
    command = [browser, *flags, "--enable-logging=stderr", "--dump-dom", page.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return run.stdout, [line for line in run.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
def test_a_browser_draws_the_curves_without_an_error(tmp_path):
    folder = write_all(tmp_path / "a <b>run")
    page = write_report([folder])[0]
    dom, errors = dump(Path(page), tmp_path)
    assert errors == []
    drawn = dom[dom.index("<main>") :]
    curves = re.findall(r'<path class="js-line"[^>]* d="M[^"]{20,}"', drawn)
    assert len(curves) >= 5  # loss twice, learning rate, gradient norm, speed
    for title in ("Loss (nats per token)", "Learning rate", "Tokens per second", "Hours of train"):
        assert title in drawn
    assert "<title>a &lt;b&gt;run</title>" in dom
    assert "taken over" in texts(drawn)  # as text
