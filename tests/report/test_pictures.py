"""Pictures of runs: what is drawn, from which rows, beside which published figures, within what."""

import json
import struct
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from pretrain_lib.report.baselines import loss_baselines, score_baselines
from pretrain_lib.report.curves import looks_of, robust_limits, without_spikes
from pretrain_lib.report.pictures import choose_panels, plot_runs
from pretrain_lib.report.runs import flops_per_token, open_runs, positions
from pretrain_lib.run_folder.rows import column, read_metrics, scored_tasks, smooth

pytestmark = pytest.mark.moderate

RECIPE_MODEL = {"vocabulary_size": 50257, "num_layers": 12, "width": 768}
RECIPE_DATA = {
    "source": "HuggingFaceFW/fineweb-edu:sample-10BT",
    "path": None,
    "validation": "first:100000000",
}
LARGE_MODEL = {"vocabulary_size": 8192, "num_layers": 24, "width": 2048}
SCORES = {
    "hellaswag/acc": 0.28,
    "hellaswag/acc_norm": 0.30,
    "hellaswag/acc_norm_stderr": 0.0046,
    "hellaswag/acc_norm_per_token": 0.29,
    "arc_easy/acc_norm": 0.4,
    "arc_easy/acc_norm_per_token": 0.41,
    "wikitext/word_perplexity": 60.0,
    "mine/acc": 0.5,
}


def write_run(folder: Path, *, steps: int = 60, final: float = 3.0, **changes) -> list[dict]:
    """Write a run's metrics.jsonl and return its rows."""
    rows = []
    for step in range(steps + 1):
        common = {"step": step, "tokens": step * 1024}
        loss = final + 7 * 0.8**step
        if step % 20 == 0:
            scores = {"loss": loss, "perplexity": float(np.exp(loss)), "bits_per_byte": None}
            rows.append({"kind": "validation", **common, **scores})
            rows.append({"kind": "evaluation", **common, **SCORES})
        if step:
            train = {"loss": loss, "lr": 1e-3 / step, "grad_norm": 1 / step, "mfu": None}
            speed = {"tokens_per_second": 5e4, "seconds": 0.02}
            rows.append({"kind": "train", **common, **train, **speed, **changes})
    last = {"step": steps, "tokens": steps * 1024}
    rows += [{"kind": "event", **last, "event": event} for event in ("skipped", "rollback", "new")]
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
    assert scored_tasks([rows, rows]) == {
        "hellaswag": ["acc", "acc_norm", "acc_norm_per_token"],
        "arc_easy": ["acc_norm", "acc_norm_per_token"],
        "wikitext": ["word_perplexity"],
        "mine": ["acc"],
    }


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


def test_a_run_that_has_not_trained_yet_is_left_out_of_several(tmp_path, capsys):
    for name in ("one", "other", "begun"):
        (tmp_path / name).mkdir()
    rows = [write_run(tmp_path / name) for name in ("one", "other")]
    (tmp_path / "begun" / "metrics.jsonl").write_text("")
    folders = [tmp_path / name for name in ("begun", "one", "other", "begun")]
    assert [len(run.rows) for run in open_runs(folders)] == [len(own) for own in rows]
    assert capsys.readouterr().err.count("left out: ") == 2
    plot_runs(folders, tmp_path / "all.png")
    assert (tmp_path / "all.png").is_file()
    with pytest.raises(ValueError, match="no train row yet"):
        open_runs([tmp_path / "begun"] * 2)


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


def test_only_spikes_are_left_out_of_the_average():
    tokens, values = np.arange(1000.0), np.random.default_rng(0).normal(3, 0.05, size=1000)
    values[[10, 400, 401, 999]] = 9.0
    usual = without_spikes(tokens, values, 20)
    assert np.flatnonzero(np.isnan(usual)).tolist() == [400, 401, 999]  # the first is of the start
    assert np.array_equal(usual[~np.isnan(usual)], values[~np.isnan(usual)])
    assert np.array_equal(without_spikes(tokens, values, 1), values)


def test_limits_hold_the_curve_but_neither_its_start_nor_its_spikes():
    tokens = np.arange(1000.0)
    values = 3 + 8 * np.exp(-tokens / 20)
    values[500:505] = 50.0
    low, high = robust_limits([(tokens, values)])
    assert 2.9 < low < 3 and values[100] < high < 4
    low, high = robust_limits([(tokens, values)], [3.29, 1e3])
    assert 2.9 < low < 3 and 3.29 < high < 4  # a line too far off is not shown
    few = np.array([0.0, 10.0]), np.array([0.25, 0.3])
    low, high = robust_limits([few])
    assert low < 0.25 and high > 0.3


def test_limits_of_a_short_run_hold_its_whole_fall():
    tokens = np.arange(1.0, 31.0)
    values = 4 + 5 * np.exp(-tokens / 5)
    low, high = robust_limits([(tokens, values), (np.array([0.0, 30.0]), np.array([9.05, 4.2]))])
    assert low < 4.1 and 9.05 < high < 10


def test_each_axis_has_its_place_of_a_row(tmp_path):
    rows = write_run(tmp_path, steps=4)
    for row in rows:
        row["seconds"] = 900 * row["step"]
    steps = [row["step"] for row in rows]
    assert positions(rows, "steps").tolist() == steps
    assert positions(rows, "tokens").tolist() == [1024 * step for step in steps]
    hours = positions(rows, "hours").tolist()  # known of train rows only
    assert hours == pytest.approx([step / 4 for step in steps])
    flops = positions(rows, "flops", flops_per_token=10.0).tolist()
    assert flops == [10_240 * step for step in steps]
    shape = {"vocabulary_size": 100, "num_layers": 2, "num_heads": 2, "width": 64}
    rate = flops_per_token({"model": shape, "batch": {"sequence_length": 32}})
    # 100 x 64 of the head, 12 d^2 + 13 d of a block, 2 d of the last norm; 12 L d T of attention
    weights = 100 * 64 + 2 * (12 * 64**2 + 13 * 64) + 2 * 64
    assert rate == 6 * weights + 12 * 2 * 64 * 32
    llama = shape | {"num_key_value_heads": 2, "mlp_width": 128}
    assert flops_per_token({"model": llama, "batch": {"sequence_length": 32}}) > 0
    with pytest.raises(ValueError, match="give --x tokens, steps or hours"):
        plot_runs([tmp_path], x="flops")


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_suffix_of_the_picture_chooses_its_format(tmp_path, suffix):
    write_run(tmp_path / "run")
    panels = {".png": ["loss"], ".svg": ["lr", "speed"], ".pdf": ["scores"]}[suffix]
    (path,) = plot_runs([tmp_path / "run"], tmp_path / f"a{suffix}", panels=panels, x="steps")
    assert path.suffix == suffix and [path] == list(tmp_path.glob("a*"))
    assert path.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml", b"%PDF-")


def test_panels_of_which_there_are_none_are_refused(tmp_path):
    rows = write_run(tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows if r["kind"] != "evaluation"))
    with pytest.raises(ValueError, match="panels=scores: the runs have no scores yet"):
        plot_runs([tmp_path / "run"], panels=["scores"])
    with pytest.raises(ValueError, match="separated by commas; did you mean grad_norm"):
        plot_runs([tmp_path / "run"], panels=["grad_nrom"])
    assert not (tmp_path / "run" / "plots").exists()


def test_rows_after_the_last_step_are_left_out(tmp_path):
    write_run(tmp_path)
    (run,) = open_runs([tmp_path], last_step=20)
    assert max(row["step"] for row in run.rows) == 20


def test_runs_differ_by_color_or_marker():
    assert len({(look.color, look.marker) for look in looks_of(20)}) == 20


def settings(model=RECIPE_MODEL, **data):
    return {"model": model, "data": RECIPE_DATA | data}


def values(figures):
    return {figure.model: figure.value for figure in figures}


def test_the_loss_is_compared_on_the_recipe_s_own_validation_text_only(tmp_path):
    assert values(loss_baselines([settings()])) == {"GPT-2 124M": 3.2924}
    others = [
        settings(source="HuggingFaceFW/fineweb-edu:sample-100BT"),
        settings(validation="hash"),
        settings(validation=str(tmp_path)),
        settings(RECIPE_MODEL | {"vocabulary_size": 8192}),
        settings(path=str(tmp_path / "gone")),
        {},
    ]
    for other in others:
        assert loss_baselines([other]) == []
        assert loss_baselines([settings(), other]) == []
    assert loss_baselines([]) == []
    # A prepared folder says itself what it holds, whatever source the recipe names.
    for source, expected in ((RECIPE_DATA["source"] + "@v1", {"GPT-2 124M": 3.2924}), ("mine", {})):
        manifest = {"sources": [source], "validation": "first:100e6"}
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        assert values(loss_baselines([settings(path=str(tmp_path))])) == expected


def test_scores_are_compared_with_models_of_the_size_under_the_same_metric():
    task = ([settings()], "hellaswag")
    assert values(score_baselines(*task, "acc_norm")) == {"GPT-2 124M": 0.3114}
    both = {"GPT-2 124M": 0.294463, "GPT-3 125M": 0.337}
    assert values(score_baselines(*task, "acc_norm_per_token")) == both
    large = score_baselines([settings(LARGE_MODEL)], "hellaswag", "acc_norm_per_token")
    assert values(large) == {"GPT-2 XL": 0.488946, "GPT-3 1.3B": 0.547}
    assert score_baselines([settings()], "hellaswag_local", "acc_norm") == []


def test_each_task_has_a_panel_and_hellaswag_one_by_token_as_well(tmp_path):
    panels = choose_panels([write_run(tmp_path)], [settings()])
    assert [panel.title for panel in panels] == [
        "hellaswag acc_norm",
        "hellaswag acc_norm_per_token",
        "arc_easy acc_norm",
        "wikitext word_perplexity",
        "mine acc",
    ]


@pytest.mark.slow
def test_one_picture_in_two_formats_in_the_run_folder(tmp_path):
    write_run(tmp_path / "run")
    before = dict(matplotlib.rcParams)
    paths = plot_runs([tmp_path / "run"])
    plots = tmp_path / "run" / "plots"
    assert paths == [plots / "curves.png", plots / "curves.svg"]
    width, height = struct.unpack(">II", paths[0].read_bytes()[16:24])
    assert width == 1500 and height > 1500  # a row of training and two of scores below the loss
    box = ElementTree.parse(paths[1]).getroot().get("viewBox").split()
    assert [float(side) for side in box] == pytest.approx([0, 0, width * 0.48, height * 0.48])
    assert dict(matplotlib.rcParams) == before


def test_the_picture_says_what_it_shows(tmp_path, monkeypatch):
    write_run(tmp_path / "run", final=3.2)
    (tmp_path / "run" / "manifest.json").write_text(json.dumps({"config": settings()}))
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # texts stay texts
    svg = plot_runs([tmp_path / "run"])[1].read_text(encoding="utf-8")
    said = ["run", "Loss (nats per token)", "Tokens", "Gradient norm", "Tokens per second"]
    said += ["skipped (1)", "rollback (1)", "new (1)", "hellaswag acc_norm_per_token", "60K"]
    said += ["GPT-2 124M: 3.292", "GPT-2 124M: 0.3114", "GPT-3 125M: 0.337", "validation; scores"]
    for text in said:
        assert text in svg, text


@pytest.mark.slow
def test_the_same_runs_give_the_same_bytes(tmp_path):
    for name in "ab":
        write_run(tmp_path / name, final=3.0 + (name == "b"))
    runs = [tmp_path / "a", tmp_path / "b"]
    first = [path.read_bytes() for path in plot_runs(runs, tmp_path / "v1.5")]
    second = [path.read_bytes() for path in plot_runs(runs, tmp_path / "more" / "again.v2")]
    assert first == second
    assert sorted(path.name for path in tmp_path.glob("v1.5*")) == ["v1.5.png", "v1.5.svg"]
    assert sorted(path.name for path in tmp_path.glob("more/*")) == ["again.v2.png", "again.v2.svg"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("changes", [{}, {"grad_norm": None, "loss": None}, {"loss": float("nan")}])
def test_a_run_of_one_step_or_without_values_is_drawn(tmp_path, changes):
    write_run(tmp_path, steps=1, **changes)
    assert all(path.stat().st_size > 10_000 for path in plot_runs([tmp_path]))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [1e160, 1e250, 1e300, None])
def test_a_perplexity_of_any_size_is_drawn(tmp_path, value):
    rows = write_run(tmp_path, steps=60)
    name = "wikitext/word_perplexity"
    first = next(row for row in rows if row["kind"] == "evaluation")
    first |= {name: value, f"{name}_stderr": value}
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text)
    assert all(path.stat().st_size > 10_000 for path in plot_runs([tmp_path]))


def test_importing_it_does_not_import_matplotlib():
    code = "import sys, pretrain_lib.report.pictures; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
