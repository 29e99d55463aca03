"""Plot runs from their `metrics.jsonl`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
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
    save_figure,
    tick,
)
from pretrain_lib.report.runs import AXIS_TITLES, Axis, Run, format_tick, open_runs
from pretrain_lib.run_folder.rows import Rows, column, scored_tasks
from pretrain_lib.values import did_you_mean, show

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The metadata of each format: without the date, the same runs give the same bytes.
FORMATS = {".png": None, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
DEFAULT_FORMATS = (".png", ".svg")
PANELS = ("loss", "lr", "grad_norm", "speed", "scores")
WIDTH, LOSS_HEIGHT, ROW_HEIGHT = 10, 4.4, 2.6  # inches
COLUMNS = 3
HEADROOM = 1.2
LOG_TICKS = (1, 2, 5)
LARGEST = 1e250  # that is drawn: beyond it, matplotlib's ticks would overflow
LOSS_TITLE = "Loss (nats per token)"
TITLES = {
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "speed": "Tokens per second",
}
COLUMNS_OF = {"speed": "tokens_per_second"}  # in the train rows, if it has another name
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


def plot_runs(
    runs: Sequence[Path],
    out: Path | None = None,
    *,
    x: Axis = "tokens",
    panels: Sequence[str] = PANELS,
    last_step: int | None = None,
) -> list[Path]:
    """Plot one or several runs in one figure; return the paths of the pictures.

    Shows the `panels` over `x`: loss (nats per token), learning rate, gradient norm, speed (tokens
    per second) and scores; the events of the runs as marks, and GPT-2 and GPT-3 as dashed lines
    where they are comparable. Rows after `last_step` are left out. `out` is the path of the
    picture, by default `plots/curves` in the run's folder, or `plots/comparison` in that of the
    first of several runs. It is written as PNG, SVG or PDF if `out` ends so, else as PNG and SVG.
    Raises ValueError for a run without train rows, an unknown panel, or nothing to draw.
    """
    check_panels(panels)
    opened = open_runs(runs, axis=x, last_step=last_step)
    if out is None:
        out = runs[0] / "plots" / ("curves" if len(runs) == 1 else "comparison")
    suffixes = (out.suffix,) if out.suffix in FORMATS else DEFAULT_FORMATS
    stem = out.with_suffix("") if out.suffix in FORMATS else out

    from matplotlib import rc_context

    with rc_context(STYLE):
        figure = _draw(opened, panels, axis=x)
        _settle(figure)
        paths = [stem.with_name(stem.name + suffix) for suffix in suffixes]
        stem.parent.mkdir(parents=True, exist_ok=True)
        for path in paths:
            save_figure(figure, path, metadata=FORMATS[path.suffix])
    return paths


def check_panels(panels: Sequence[str]) -> None:
    """Raise ValueError for a name that is not in `PANELS`, or none at all."""
    for name in panels or [""]:
        if name not in PANELS:
            raise ValueError(
                f"panels={show(name)} must be some of {', '.join(PANELS)}, separated by commas"
                f"{did_you_mean(name, PANELS)}"
            )


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
        usual = [metric for metric in metrics if metric != PER_TOKEN]
        usual.sort(key=lambda metric: (not published[metric], _rank(metric)))
        second = [PER_TOKEN] if published.get(PER_TOKEN) else []
        panels += [Panel(task, metric, published[metric]) for metric in [*usual[:1], *second]]
    return panels


def _rank(metric: str) -> int:
    return MAIN_METRICS.index(metric) if metric in MAIN_METRICS else len(MAIN_METRICS)


def _draw(runs: list[Run], wanted: Sequence[str], *, axis: Axis) -> "Figure":
    from matplotlib.figure import Figure

    rows, settings = [run.rows for run in runs], [run.settings for run in runs]
    looks = looks_of(len(runs))
    scores = choose_panels(rows, settings) if "scores" in wanted else []
    small = [name for name in TITLES if name in wanted] + [score.title for score in scores]
    grid, heights = _arrange(small, with_loss="loss" in wanted)
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    panels = figure.subplot_mosaic(grid, height_ratios=heights)
    end = max(row["x"] for each in rows for row in each) or 1.0
    for name, panel in panels.items():
        panel.set_xlim(-0.02 * end, 1.02 * end)
        _set_up(panel, {"loss": LOSS_TITLE, **TITLES}.get(name, name), axis)
    if "loss" in panels:
        _fill_loss(panels["loss"], rows, looks, loss_baselines(settings))
    _fill_training(panels, rows, looks)
    for score in scores:
        _fill_score(panels[score.title], score, rows, looks)
    _add_legend(figure, runs, looks, shown=panels.keys() & {"loss", *TITLES}, scored=bool(scores))
    return figure


def _arrange(small: list[str], *, with_loss: bool) -> tuple[list[list[str]], list[float]]:
    """Return the names of the panels row by row, the loss alone in the first, and the heights."""
    if not small and not with_loss:
        raise ValueError("panels=scores: the runs have no scores yet; give --panels loss as well")
    columns = max(1, min(COLUMNS, len(small)))
    filled = small + ["."] * (-len(small) % columns)
    below = [filled[first : first + columns] for first in range(0, len(filled), columns)]
    height = ROW_HEIGHT if with_loss or len(below) > 1 else LOSS_HEIGHT
    grid = [["loss"] * columns, *below] if with_loss else below
    return grid, [LOSS_HEIGHT] * with_loss + [height] * len(below)


def _set_up(panel: "Axes", title: str, axis: Axis) -> None:
    wide = title == LOSS_TITLE
    panel.set_title(title)
    panel.set_xlabel(AXIS_TITLES[axis])
    panel.xaxis.set_major_formatter(format_tick(axis))
    panel.yaxis.set_major_formatter(tick)
    panel.locator_params(axis="x", nbins=10 if wide else 4)
    panel.locator_params(axis="y", nbins=9 if wide else 5)


def _fill_loss(
    panel: "Axes", runs: list[Rows], looks: list[Look], published: list[Published]
) -> None:
    for place, (rows, look) in enumerate(zip(runs, looks, strict=True)):
        draw_noisy(panel, *column(rows, "train", "loss", x="x"), look)
        draw_measured(panel, *column(rows, "validation", "loss", x="x"), look)
        draw_events(panel, rows, look, place=place)
    kinds = ("train", "validation")
    curves = [column(rows, kind, "loss", x="x") for rows in runs for kind in kinds]
    panel.set_ylim(*robust_limits(curves, [figure.value for figure in published]))
    draw_baselines(panel, published, curves, label=(0.15, 0.07))


def _fill_training(panels: dict[str, "Axes"], runs: list[Rows], looks: list[Look]) -> None:
    for name, panel in ((name, panels[name]) for name in TITLES if name in panels):
        curves = [column(rows, "train", COLUMNS_OF.get(name, name), x="x") for rows in runs]
        for curve, look in zip(curves, looks, strict=True):
            if name == "lr":
                draw_line(panel, *curve, look)
            else:
                draw_noisy(panel, *curve, look, spikes=name == "grad_norm")
        _, high = robust_limits(curves)
        panel.set_ylim(0.0, None if name == "lr" else HEADROOM * high)


def _fill_score(panel: "Axes", score: Panel, runs: list[Rows], looks: list[Look]) -> None:
    name, curves, bounds = f"{score.task}/{score.metric}", [], []
    for rows, look in zip(runs, looks, strict=True):
        x, values = column(rows, "evaluation", name, x="x")
        values[values > LARGEST] = np.nan
        errors = column(rows, "evaluation", f"{name}_stderr")[1]
        errors = np.where(errors < LARGEST, errors, 0.0)
        draw_measured(panel, x, values, look, errors=errors)
        curves.append((x, values))
        bounds += [(x, values - errors), (x, values + errors)]
    lines = [figure.value for figure in score.published]
    if "perplexity" in score.metric:  # falls by orders of magnitude
        _use_logarithm(panel)
        powers = [(x, np.log10(values)) for x, values in curves]
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


def _add_legend(
    figure: "Figure", runs: list[Run], looks: list[Look], *, shown: set[str], scored: bool
) -> None:
    """Add a legend of the lines and marks of the panels `shown`, and runs, above the panels."""
    from matplotlib.lines import Line2D

    entry, entries, first = partial(Line2D, [], []), [], looks[0]
    if len(runs) > 1:
        first = Look(GREY, GREY, "o", True)
        for run, look in zip(runs, looks, strict=True):
            curve = entry(
                label=run.name, color=look.color, linewidth=2.5, marker=look.marker, markersize=6
            )
            entries.append(curve)
    if shown:
        marker = first.marker if first.marks_noisy else None
        label = "train, average without spikes"
        entries.append(entry(label=label, color=first.color, linewidth=1.6, marker=marker))
    label = "; ".join(["validation"] * ("loss" in shown) + ["scores, ± stderr"] * scored)
    if label:
        hollow = entry(
            label=label,
            color=first.validation_color,
            linewidth=1.2,
            marker="o",
            markersize=5,
            markerfacecolor="white",
        )
        entries.append(hollow)
    entries += event_entries(run.rows for run in runs if "loss" in shown)
    figure.legend(
        handles=entries,
        loc="outside upper left",
        ncols=max(1, int(WIDTH / max(_width(entry.get_label()) for entry in entries))),
        title=runs[0].name if len(runs) == 1 else None,
        title_fontproperties={"weight": "bold", "size": 11},
        alignment="left",
    )


def _width(label: str) -> float:
    """Return the approximate width of a legend entry in inches."""
    return 0.4 + 0.068 * len(label)
