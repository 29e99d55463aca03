"""Draw the elements of a figure: lines, event marks, baselines, axis limits.

Runs differ by color and, for readers without color, by marker shape.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pretrain_lib.evaluate.references import Figure as Published
from pretrain_lib.files.writes import write_atomically
from pretrain_lib.run_folder.metrics import human
from pretrain_lib.run_folder.rows import Rows, smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# The color-blind-safe palette of Okabe and Ito (2008), ordered so that neighbors differ in
# lightness, without yellow, which is too pale for thin lines.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
VALIDATION_COLOR = "#D55E00"  # if there is a single run
GREY = "#555555"
EVENT_MARKERS = {"skipped": "x", "rollback": "<", "not_saved": "s", "resumed": ">"}
OTHER_EVENT = "d"
SMOOTHED_SHARE = 1 / 50  # window of the moving average, as a share of a run's rows
SKIPPED_SHARE = 1 / 20  # share of a run, at its start, that may be outside the y limits
WHOLE_SHARE = 1 / 5  # what the remainder must fill of the height for the start to be inside
SPIKE_SHARE = 1 / 50  # share of the highest values ignored for the limits
SPIKE_SIGMA = 8.0
FEWEST_LATER = 2  # with fewer values after the skipped share, it is not ignored
FEWEST_WITH_SPIKES = 20  # with fewer values, none is ignored as a spike
# A baseline is shown if its distance is at most this multiple of the height of the curves, or this
# share of the highest value.
FARTHEST_LINE, NEAR_LINE = 4.0, 0.25
FEW_POINTS = 20  # with fewer points, each is marked by a dot
POINTS_BETWEEN = 200  # interpolated points per curve, to find a free place for a label
MARKERS_PER_LINE = 12  # approximate
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.constrained_layout.w_pad": 0.1,  # inches
    "figure.constrained_layout.h_pad": 0.1,
    "svg.hashsalt": "pretrain_lib",  # makes the SVG reproducible
}

Curves = Iterable[tuple[np.ndarray, np.ndarray]]  # (x, values)


@dataclass(frozen=True)
class Look:
    """The style of the lines of one run."""

    color: str
    validation_color: str
    marker: str
    marks_noisy: bool
    """Whether training curves have markers too, because there are several runs."""


def save_figure(figure: "Figure", path: Path, *, metadata: dict | None = None) -> None:
    """Write a picture in the format that the ending of its path names, whole or not at all."""
    content = BytesIO()
    figure.savefig(content, format=path.suffix.removeprefix("."), dpi=150, metadata=metadata)
    write_atomically(path.resolve(), content.getbuffer())  # through a link, not in its place


def looks_of(number: int) -> list[Look]:
    """Return a style for each of `number` runs, with a color and a marker of its own."""
    if number == 1:
        return [Look(COLORS[0], VALIDATION_COLOR, MARKERS[0], False)]
    pairs = [(COLORS[n % len(COLORS)], MARKERS[n % len(MARKERS)]) for n in range(number)]
    return [Look(color, color, marker, True) for color, marker in pairs]


def draw_noisy(
    panel: "Axes", x: np.ndarray, values: np.ndarray, look: Look, *, spikes: bool = True
) -> None:
    """Draw the values as a thin, pale line and their moving average as a thick one.

    With `spikes`, extreme values are left out of the average.
    """
    # Rasterized: as vector graphics, a hundred thousand points would take megabytes of SVG.
    panel.plot(x, values, color=look.color, linewidth=0.6, alpha=0.3, rasterized=True)
    window = max(1, round(len(values) * SMOOTHED_SHARE))
    usual = without_spikes(x, values, window) if spikes else values
    draw_line(panel, x, smooth(usual, window), look)


def without_spikes(x: np.ndarray, values: np.ndarray, window: int) -> np.ndarray:
    """Return the values with spikes, which would distort the moving average, replaced by NaN.

    A spike is more than `SPIKE_SIGMA` robust standard deviations above the average, and not within
    the first `SKIPPED_SHARE` of the run.
    """
    above = values - smooth(values, window)
    deviations = np.abs(above[np.isfinite(above)])
    # The standard deviation of a normal distribution is 1.4826 times its MAD.
    sigma = 1.4826 * np.median(deviations) if len(deviations) else 0.0
    is_spike = (above > SPIKE_SIGMA * sigma) & _is_later(x)
    return np.where(is_spike, np.nan, values) if sigma else values


def draw_line(panel: "Axes", x: np.ndarray, values: np.ndarray, look: Look) -> None:
    """Draw a thick line, with sparse markers if there are several runs."""
    dot = "." if len(values) < FEW_POINTS else None  # a line of one point would be invisible
    panel.plot(
        x,
        values,
        color=look.color,
        linewidth=1.6,
        marker=look.marker if look.marks_noisy else dot,
        markersize=5,
        markevery=max(1, len(values) // MARKERS_PER_LINE),
    )


def draw_measured(
    panel: "Axes",
    x: np.ndarray,
    values: np.ndarray,
    look: Look,
    *,
    errors: np.ndarray | None = None,
) -> None:
    """Draw periodic measurements as hollow markers on a thin line, with errors as a band."""
    color = look.validation_color
    if errors is not None:
        half = np.nan_to_num(errors)
        panel.fill_between(x, values - half, values + half, color=color, alpha=0.15, linewidth=0)
    panel.plot(
        x,
        values,
        color=color,
        linewidth=1.2,
        marker=look.marker,
        markersize=5,
        markerfacecolor="white",
        markeredgewidth=1.2,
        markevery=max(1, len(values) // MARKERS_PER_LINE),
        zorder=3,
    )


def draw_baselines(
    panel: "Axes", published: Sequence[Published], curves: Curves, *, label: tuple[float, float]
) -> None:
    """Draw published scores as dashed lines, each labeled where it covers the fewest points.

    The axis limits must be set before. `label` is the size of a label in axes fractions.
    """
    scale = panel.transScale + panel.transLimits  # from data to axes fractions
    points = np.concatenate([scale.transform(_densely(*curve)) for curve in curves])
    low, high = panel.get_ylim()
    for figure in (figure for figure in published if low < figure.value < high):
        panel.axhline(figure.value, color=GREY, linewidth=1.0, linestyle="--", zorder=2)
        height = scale.transform((0, figure.value))[1]
        right, below = _emptiest_side(points, height, label)
        panel.annotate(
            f"{figure.model}: {figure.value:.4g}",
            xy=(float(right), figure.value),
            xycoords=("axes fraction", "data"),
            xytext=(-4 if right else 4, -3 if below else 3),
            textcoords="offset points",
            ha="right" if right else "left",
            va="top" if below else "bottom",
            fontsize=8,
            bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.8},
            zorder=5,
        )


def _densely(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the points of a curve, and interpolated ones between them: `(N, 2)`."""
    finite = np.isfinite(values)
    if not finite.any():
        return np.zeros((0, 2))
    x, values = x[finite], values[finite]
    between = np.linspace(x[0], x[-1], POINTS_BETWEEN)
    filled = np.concatenate([values, np.interp(between, x, values)])
    return np.column_stack([np.concatenate([x, between]), filled])


def _emptiest_side(
    points: np.ndarray, height: float, label: tuple[float, float]
) -> tuple[bool, bool]:
    """Return whether a line's label should be at its right end, and whether below the line."""

    def covered(side: tuple[bool, bool]) -> int:
        right, below = side
        away = 1 - points[:, 0] if right else points[:, 0]
        up = height - points[:, 1] if below else points[:, 1] - height
        return int(((away < label[0]) & (up > 0) & (up < label[1])).sum())

    return min([(True, False), (True, True), (False, False), (False, True)], key=covered)


def draw_events(panel: "Axes", rows: Rows, look: Look, *, place: int) -> None:
    """Draw the events of a run as marks above the x axis; run number `place` has its own height."""
    events = [row for row in rows if row["kind"] == "event"]
    for name in dict.fromkeys(row["event"] for row in events):
        places = [row["x"] for row in events if row["event"] == name]
        panel.plot(
            places,
            [0.03 + 0.05 * place] * len(places),
            transform=panel.get_xaxis_transform(),
            color=look.color,
            marker=EVENT_MARKERS.get(name, OTHER_EVENT),
            markersize=6,
            linestyle="none",
            zorder=4,
        )


def event_entries(runs: Iterable[Rows]) -> list["Line2D"]:
    """Return the legend entries of the events, each with its count."""
    from matplotlib.lines import Line2D

    names = Counter(row["event"] for rows in runs for row in rows if row["kind"] == "event")
    return [
        Line2D(
            [],
            [],
            marker=EVENT_MARKERS.get(name, OTHER_EVENT),
            label=label,
            color=GREY,
            linestyle="none",
            markersize=6,
        )
        for name, label in ((n, f"{n.replace('_', ' ')} ({count:,})") for n, count in names.items())
    ]


def robust_limits(
    curves: Curves, lines: Iterable[float] = (), *, spike_share: float = SPIKE_SHARE
) -> tuple[float, float]:
    """Return y limits that fit the curves without spikes.

    The first `SKIPPED_SHARE` is left out if the remainder would fill less than `WHOLE_SHARE` of the
    height beside it, so that a short run shows its whole fall and a long one its end. Values in
    `lines` are included unless they are too far away.
    """
    start, parts = [np.zeros(0)], [np.zeros(0)]
    for x, values in curves:
        finite = np.isfinite(values)
        is_later = finite & _is_later(x)
        is_later = is_later if is_later.sum() >= FEWEST_LATER else finite
        later = values[is_later]
        if len(later) >= FEWEST_WITH_SPIKES:
            later = later[later <= np.quantile(later, 1 - spike_share)]
        parts.append(later)
        start.append(values[finite & ~is_later])
    values = np.concatenate(parts)
    if not len(values):
        return 0.0, 1.0
    whole = np.concatenate([values, *start])
    if np.ptp(values) >= WHOLE_SHARE * np.ptp(whole):
        values = whole
    low, high = float(values.min()), float(values.max())
    reach = max(FARTHEST_LINE * (high - low), NEAR_LINE * abs(high))
    near = [line for line in lines if low - reach <= line <= high + reach]
    low, high = min([low, *near]), max([high, *near])
    share = 0.12 if near else 0.06  # leaves room for the label of a line at the edge
    margin = share * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _is_later(x: np.ndarray) -> np.ndarray:
    return x >= x.max(initial=0.0) * SKIPPED_SHARE


def tick(value: float, _position: object = None) -> str:
    """Format a tick label: 2.5B."""
    return human(value)
