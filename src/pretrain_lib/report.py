"""Pictures of runs, drawn from their `metrics.jsonl`. Floor 5."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pretrain_lib.metrics import human
from pretrain_lib.run_folder import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")
# Okabe and Ito (2008), which the colour-blind tell apart; their yellow is too pale for thin lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SMOOTHED_SHARE = 1 / 50  # of a run's steps, averaged into one point of the thick line
SKIPPED_SHARE = 1 / 20  # of a run, at its start, that does not set the limits of the y axis
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.constrained_layout.w_pad": 0.12,  # inches
    "figure.constrained_layout.h_pad": 0.12,
    "svg.hashsalt": "pretrain_lib",  # the same run gives the same file
}

Rows = list[dict]


def plot_runs(runs: Sequence[Path], out: Path | None = None) -> list[Path]:
    """Draw the curves of one or several runs as one picture and return its PNG and its SVG.

    Loss (nats per token), learning rate, gradient norm and speed over tokens. `out` is the
    picture's path, its suffix ignored; by default `plots/curves` in the run's folder, for several
    runs `plots/comparison` in the first. Raises ValueError for a run without train rows.
    """
    if not runs:
        raise ValueError("runs is empty: name at least one run folder")
    rows = {run: read_metrics(run) for run in runs}
    if out is None:
        out = runs[0] / "plots" / ("curves" if len(runs) == 1 else "comparison")
    stem = out.with_suffix("") if out.suffix in FORMATS else out
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(stem.name + suffix) for suffix in FORMATS]

    from matplotlib import rc_context

    with rc_context(STYLE):
        figure = _draw(rows)
        figure.savefig(paths[0], dpi=150)
        figure.savefig(paths[1], dpi=150, metadata={"Date": None})
    return paths


def read_metrics(run: Path) -> Rows:
    """Return every row of a run's `metrics.jsonl`, in order.

    A last line without its end is being written by a live run, and left out. Raises ValueError for
    a missing file, a line that is no JSON object, or no train row.
    """
    path = run / METRICS
    if not path.is_file():
        raise ValueError(f"{run} is not a run folder: it has no {METRICS}")
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {line[:60]!r}") from error
    if not any(row["kind"] == "train" for row in rows):
        raise ValueError(f"{path} has no train row yet: run at least one step, then plot")
    return rows


def column(rows: Rows, kind: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return `(tokens, values)` of the rows of a kind, float64; a missing value is nan."""
    chosen = [row for row in rows if row["kind"] == kind]
    tokens = np.array([row["tokens"] for row in chosen], dtype=np.float64)
    return tokens, np.array([row.get(name) for row in chosen], dtype=np.float64)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Return the centred moving average over `window` values, nan and the ends left out of it."""
    finite, ones = np.isfinite(values), np.ones(window)
    sums = np.convolve(np.where(finite, values, 0.0), ones)
    counts = np.convolve(finite.astype(np.float64), ones)
    middle = slice((window - 1) // 2, (window - 1) // 2 + len(values))
    with np.errstate(invalid="ignore"):
        return np.where(counts > 0, sums / counts, np.nan)[middle]


def _tick(value: float, _position: object = None) -> str:
    return human(value)


def _draw(runs: dict[Path, Rows]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplot_mosaic(
        [["loss"] * 3, ["lr", "grad_norm", "tokens_per_second"]], height_ratios=[1.7, 1]
    )
    titles = ("Loss (nats per token)", "Learning rate", "Gradient norm", "Tokens per second")
    for (name, panel), title in zip(panels.items(), titles, strict=True):
        panel.set_title(title)
        panel.set_xlabel("Tokens")
        panel.xaxis.set_major_formatter(_tick)
        panel.locator_params(axis="x", nbins=8 if name == "loss" else 4)
        panel.locator_params(axis="y", nbins=9 if name == "loss" else 5)
    for number, rows in enumerate(runs.values()):
        colour = COLOURS[number % len(COLOURS)]
        _draw_loss(panels["loss"], rows, colour)
        panels["lr"].plot(*column(rows, "train", "lr"), color=colour, linewidth=1.5)
        for name in ("grad_norm", "tokens_per_second"):
            _draw_noisy(panels[name], *column(rows, "train", name), colour)
    _limit_panels(panels, runs)
    _add_legend(panels["loss"], _labels(list(runs)))
    return figure


def _draw_loss(panel: "Axes", rows: Rows, colour: str) -> None:
    _draw_noisy(panel, *column(rows, "train", "loss"), colour)
    panel.plot(
        *column(rows, "validation", "loss"),
        color=colour,
        linewidth=0.8,
        linestyle="--",
        marker="o",
        markersize=5,
        markerfacecolor="white",
        markeredgewidth=1.4,
        zorder=3,
    )


def _draw_noisy(panel: "Axes", tokens: np.ndarray, values: np.ndarray, colour: str) -> None:
    """Draw the values thin and pale, their moving average over it."""
    # As an image within the SVG: a hundred thousand points would make it megabytes large.
    panel.plot(tokens, values, color=colour, linewidth=0.6, alpha=0.35, rasterized=True)
    window = max(1, round(len(values) * SMOOTHED_SHARE))
    marker = "." if len(values) < 20 else None  # a line of one point shows nothing
    panel.plot(tokens, smooth(values, window), color=colour, linewidth=1.6, marker=marker)


def _limit_panels(panels: dict[str, "Axes"], runs: dict[Path, Rows]) -> None:
    """Fit the y axes to what follows the first steps, which would squash the rest."""
    end = max(row["tokens"] for rows in runs.values() for row in rows)
    for panel in panels.values():
        panel.set_xlim(-0.02 * end, 1.02 * end)
    kinds = ("train", "validation")
    losses = [column(rows, kind, "loss") for rows in runs.values() for kind in kinds]
    panels["loss"].set_ylim(*_limits(losses))
    norms = [column(rows, "train", "grad_norm") for rows in runs.values()]
    low, high = _limits(norms)
    panels["grad_norm"].set_ylim(max(low, 0.0), high)
    panels["tokens_per_second"].set_ylim(bottom=0.0)
    panels["tokens_per_second"].yaxis.set_major_formatter(_tick)
    panels["lr"].set_ylim(bottom=0.0)
    panels["lr"].yaxis.set_major_formatter(_tick)


def _limits(curves: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
    """Return the y limits that hold the curves but for their first share and single spikes."""
    kept = []
    for tokens, values in curves:
        later = tokens >= tokens.max(initial=0.0) * SKIPPED_SHARE
        kept.append(values[later & np.isfinite(values)])
    values = np.concatenate(kept)
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(np.quantile(values, 0.998))
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _labels(runs: list[Path]) -> list[str]:
    """Return the runs' folder names, with their parents' where two are the same."""
    names = [run.resolve().name for run in runs]
    if len(set(names)) == len(names):
        return names
    return [f"{run.resolve().parent.name}/{run.resolve().name}" for run in runs]


def _add_legend(panel: "Axes", labels: list[str]) -> None:
    from matplotlib.lines import Line2D

    marker = {"marker": "o", "markerfacecolor": "white", "linestyle": "--", "linewidth": 0.8}
    grey = "#555555"
    entries = [
        Line2D([], [], color=COLOURS[number % len(COLOURS)], linewidth=3, label=label)
        for number, label in enumerate(labels)
    ]
    entries.append(Line2D([], [], color=grey, linewidth=1.6, label="train, moving average"))
    entries.append(Line2D([], [], color=grey, label="validation", **marker))
    panel.legend(handles=entries, loc="upper right")
