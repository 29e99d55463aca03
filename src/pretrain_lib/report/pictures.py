"""Plot runs from their `metrics.jsonl`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pretrain_lib.evaluate.per_token import METRIC as PER_TOKEN
from pretrain_lib.evaluate.references import Figure as Published
from pretrain_lib.report.baselines import loss_baselines, score_baselines
from pretrain_lib.report.curves import (
    GREY,
    STYLE,
    Look,
    draw_baselines,
    draw_events,
    draw_line,
    draw_measured,
    draw_noisy,
    event_entries,
    looks_of,
    robust_limits,
    tick,
)
from pretrain_lib.run_folder.rows import Rows, column, read_metrics, scored_tasks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")
WIDTH, LOSS_HEIGHT, ROW_HEIGHT = 10, 4.4, 2.6  # inches
COLUMNS = 3
HEADROOM = 1.2
LOG_TICKS = (1, 2, 5)
LOSS_TITLE = "Loss (nats per token)"
TITLES = {
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second",
}
MAIN_METRICS = ("acc_norm", "acc")  # in order of preference


@dataclass(frozen=True)
class Panel:
    """A metric of a task, with published scores for comparison."""

    task: str
    metric: str
    published: tuple[Published, ...]

    @property
    def title(self) -> str:
        return f"{self.task} {self.metric}"


def plot_runs(runs: Sequence[Path], out: Path | None = None) -> list[Path]:
    """Plot one or several runs in one figure; return the paths of its PNG and SVG.

    Shows loss (nats per token), learning rate, gradient norm, speed and scores over tokens, the
    events of the runs as marks, and GPT-2 and GPT-3 as dashed lines where they are comparable.
    `out` is the path of the figure, with or without suffix; by default `plots/curves` in the run's
    folder, or `plots/comparison` in that of the first of several runs. Raises ValueError for a run
    without train rows.
    """
    if not runs:
        raise ValueError("runs is empty: name at least one run folder")
    rows = [read_metrics(run) for run in runs]
    settings = [_read_settings(run) for run in runs]
    if out is None:
        out = runs[0] / "plots" / ("curves" if len(runs) == 1 else "comparison")
    stem = out.with_suffix("") if out.suffix in FORMATS else out
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(stem.name + suffix) for suffix in FORMATS]

    from matplotlib import rc_context

    with rc_context(STYLE):
        figure = _draw(rows, _labels(runs), settings)
        _settle(figure)
        figure.savefig(paths[0], dpi=150)
        figure.savefig(paths[1], dpi=150, metadata={"Date": None})
    return paths


def _settle(figure: "Figure") -> None:
    """Round the panel positions: the last digits of the layout solver differ from call to call."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for panel in figure.axes:
        panel.set_position([round(value, 6) for value in panel.get_position().bounds])


def choose_panels(runs: Sequence[Rows], settings: Sequence[dict]) -> list[Panel]:
    """Choose one metric per task, preferring one with a baseline.

    `acc_norm_per_token` is added where it has a baseline of its own.
    """
    panels = []
    for task, metrics in scored_tasks(runs).items():
        published = {metric: tuple(score_baselines(settings, task, metric)) for metric in metrics}
        own = [metric for metric in metrics if metric != PER_TOKEN]
        own.sort(key=lambda metric: (not published[metric], _rank(metric)))
        second = [PER_TOKEN] if published.get(PER_TOKEN) else []
        panels += [Panel(task, metric, published[metric]) for metric in [*own[:1], *second]]
    return panels


def _rank(metric: str) -> int:
    return MAIN_METRICS.index(metric) if metric in MAIN_METRICS else len(MAIN_METRICS)


def _read_settings(run: Path) -> dict:
    path = run / "manifest.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["config"] if path.is_file() else {}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the manifest of a run: {error}") from error


def _draw(runs: list[Rows], names: list[str], settings: list[dict]) -> "Figure":
    from matplotlib.figure import Figure

    scores, looks = choose_panels(runs, settings), looks_of(len(runs))
    small = [*TITLES, *(score.title for score in scores)]
    small += ["."] * (-len(small) % COLUMNS)
    below = [small[first : first + COLUMNS] for first in range(0, len(small), COLUMNS)]
    heights = [LOSS_HEIGHT, *[ROW_HEIGHT] * len(below)]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    panels = figure.subplot_mosaic([["loss"] * COLUMNS, *below], height_ratios=heights)
    end = max(row["tokens"] for rows in runs for row in rows)
    for name, panel in panels.items():
        panel.set_xlim(-0.02 * end, 1.02 * end)
        _set_up(panel, TITLES.get(name, name), wide=name == "loss")
    _fill_loss(panels["loss"], runs, looks, loss_baselines(settings))
    _fill_training(panels, runs, looks)
    for score in scores:
        _fill_score(panels[score.title], score, runs, looks)
    _add_legend(figure, runs, names, looks)
    return figure


def _set_up(panel: "Axes", title: str, *, wide: bool) -> None:
    panel.set_title(LOSS_TITLE if wide else title)
    panel.set_xlabel("Tokens")
    panel.xaxis.set_major_formatter(tick)
    panel.yaxis.set_major_formatter(tick)
    panel.locator_params(axis="x", nbins=10 if wide else 4)
    panel.locator_params(axis="y", nbins=9 if wide else 5)


def _fill_loss(
    panel: "Axes", runs: list[Rows], looks: list[Look], published: list[Published]
) -> None:
    for place, (rows, look) in enumerate(zip(runs, looks, strict=True)):
        draw_noisy(panel, *column(rows, "train", "loss"), look)
        draw_measured(panel, *column(rows, "validation", "loss"), look)
        draw_events(panel, rows, look, place=place)
    curves = [column(rows, kind, "loss") for rows in runs for kind in ("train", "validation")]
    panel.set_ylim(*robust_limits(curves, [figure.value for figure in published]))
    draw_baselines(panel, published, curves, label=(0.15, 0.07))


def _fill_training(panels: dict[str, "Axes"], runs: list[Rows], looks: list[Look]) -> None:
    for rows, look in zip(runs, looks, strict=True):
        draw_line(panels["lr"], *column(rows, "train", "lr"), look)
        draw_noisy(panels["grad_norm"], *column(rows, "train", "grad_norm"), look)
        speed = column(rows, "train", "tokens_per_second")
        draw_noisy(panels["tokens_per_second"], *speed, look, spikes=False)
    panels["lr"].set_ylim(bottom=0.0)
    for name in ("grad_norm", "tokens_per_second"):
        _, high = robust_limits([column(rows, "train", name) for rows in runs])
        panels[name].set_ylim(0.0, HEADROOM * high)


def _fill_score(panel: "Axes", score: Panel, runs: list[Rows], looks: list[Look]) -> None:
    name, curves, bounds = f"{score.task}/{score.metric}", [], []
    for rows, look in zip(runs, looks, strict=True):
        tokens, values = column(rows, "evaluation", name)
        errors = np.nan_to_num(column(rows, "evaluation", f"{name}_stderr")[1])
        draw_measured(panel, tokens, values, look, errors=errors)
        curves.append((tokens, values))
        bounds += [(tokens, values - errors), (tokens, values + errors)]
    lines = [figure.value for figure in score.published]
    if "perplexity" in score.metric:  # falls by orders of magnitude
        _use_logarithm(panel)
        powers = [(tokens, np.log10(values)) for tokens, values in curves]
        limits = robust_limits(powers, np.log10(lines), spike_share=0.0)
        panel.set_ylim(*(10**limit for limit in limits))
    else:
        panel.set_ylim(*robust_limits(bounds, lines, spike_share=0.0))
    draw_baselines(panel, score.published, curves, label=(0.55, 0.14))


def _use_logarithm(panel: "Axes") -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=LOG_TICKS))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(tick)


def _labels(runs: Sequence[Path]) -> list[str]:
    """Return the folder names of the runs, prefixed by their parents' if two are equal."""
    names = [run.resolve().name for run in runs]
    if len(set(names)) == len(names):
        return names
    return [f"{run.resolve().parent.name}/{run.resolve().name}" for run in runs]


def _add_legend(figure: "Figure", runs: list[Rows], names: list[str], looks: list[Look]) -> None:
    """Add a legend of lines, marks and runs above the panels."""
    from matplotlib.lines import Line2D

    entries, first = [], looks[0]
    if len(runs) > 1:
        first = Look(GREY, GREY, "o", True)
        for name, look in zip(names, looks, strict=True):
            style = {"color": look.color, "marker": look.marker, "markersize": 6}
            entries.append(Line2D([], [], linewidth=2.5, label=name, **style))
    marker = first.marker if first.marks_noisy else None
    train = {"color": first.color, "linewidth": 1.6, "marker": marker}
    entries.append(Line2D([], [], label="train, average without spikes", **train))
    hollow = {"marker": "o", "markerfacecolor": "white", "linewidth": 1.2, "markersize": 5}
    scored = any(row["kind"] == "evaluation" for rows in runs for row in rows)
    label = "validation; scores, ± stderr" if scored else "validation"
    entries.append(Line2D([], [], color=first.validation_color, label=label, **hollow))
    entries += event_entries(runs)
    figure.legend(
        handles=entries,
        loc="outside upper left",
        ncols=max(1, int(WIDTH / max(_width(entry.get_label()) for entry in entries))),
        title=names[0] if len(runs) == 1 else None,
        title_fontproperties={"weight": "bold", "size": 11},
        alignment="left",
    )


def _width(label: str) -> float:
    """Return the approximate width of a legend entry in inches."""
    return 0.4 + 0.068 * len(label)
