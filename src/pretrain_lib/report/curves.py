"""What the pictures of runs are made of: lines, marks, baselines, limits.

Runs are told apart by colour and, where there is no colour, by the shape of their markers.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pretrain_lib.evaluate.references import Figure as Published
from pretrain_lib.run_folder.metrics import human
from pretrain_lib.run_folder.rows import Rows, smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

# Okabe and Ito (2008), which the colour-blind tell apart, neighbours of unlike lightness; their
# yellow is too pale for thin lines.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
VALIDATION_COLOUR = "#D55E00"  # of a single run
GREY = "#555555"
EVENT_MARKERS = {"skipped": "x", "rollback": "<", "not_saved": "s", "resumed": ">"}
OTHER_EVENT = "d"
SMOOTHED_SHARE = 1 / 50  # of a run's rows, averaged into one point of the thick line
SKIPPED_SHARE = 1 / 20  # of a run, at its start, that does not set the limits of the y axis
SPIKE_SHARE = 1 / 50  # of the values, the highest, that do not either
SPIKE_SIGMA = 8.0
FEWEST_LATER = 2  # values that set limits: with fewer, the first share does as well
FEWEST_WITH_SPIKES = 20  # of fewer values none counts as a spike
# What is farther off than so many heights of the curves, or such a share of a value, is not shown.
FARTHEST_LINE, NEAR_LINE = 4.0, 0.25
FEW_POINTS = 20  # which are shown as such
POINTS_BETWEEN = 200  # on the lines of a curve, when a place for a name is sought
MARKERS_PER_LINE = 12  # about so many: more are a rope
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
    "svg.hashsalt": "pretrain_lib",  # the same run gives the same file
}

Curves = Iterable[tuple[np.ndarray, np.ndarray]]  # tokens and values


@dataclass(frozen=True)
class Look:
    """How the lines of one run are drawn."""

    colour: str
    validation_colour: str
    marker: str
    marks_noisy: bool
    """Whether lines of training carry markers too: there are other runs."""


def looks_of(number: int) -> list[Look]:
    """Return a look for each of so many runs, by colour and marker together."""
    if number == 1:
        return [Look(COLOURS[0], VALIDATION_COLOUR, MARKERS[0], False)]
    pairs = [(COLOURS[n % len(COLOURS)], MARKERS[n % len(MARKERS)]) for n in range(number)]
    return [Look(colour, colour, marker, True) for colour, marker in pairs]


def draw_noisy(
    panel: "Axes", tokens: np.ndarray, values: np.ndarray, look: Look, *, spikes: bool = True
) -> None:
    """Draw the values thin and pale, their moving average over it.

    `spikes` says that some values may be far too high, which the average then leaves out.
    """
    # As an image within the SVG: a hundred thousand points would make it megabytes large.
    pale = {"linewidth": 0.6, "alpha": 0.3, "rasterized": True}
    panel.plot(tokens, values, color=look.colour, **pale)
    window = max(1, round(len(values) * SMOOTHED_SHARE))
    usual = without_spikes(tokens, values, window) if spikes else values
    draw_line(panel, tokens, smooth(usual, window), look)


def without_spikes(tokens: np.ndarray, values: np.ndarray, window: int) -> np.ndarray:
    """Return the values, nan for those that would lift their moving average to a plateau.

    They are `SPIKE_SIGMA` robust standard deviations above it, and none of the run's first share.
    """
    above = values - smooth(values, window)
    known = np.abs(above[np.isfinite(above)])
    sigma = 1.4826 * np.median(known) if len(known) else 0.0  # of a normal distribution, its MAD
    is_spike = (above > SPIKE_SIGMA * sigma) & _is_later(tokens)
    return np.where(is_spike, np.nan, values) if sigma else values


def draw_line(panel: "Axes", tokens: np.ndarray, values: np.ndarray, look: Look) -> None:
    """Draw a thick line, with a marker here and there if there are other runs."""
    dot = "." if len(values) < FEW_POINTS else None  # a line of one point shows nothing
    panel.plot(
        tokens,
        values,
        color=look.colour,
        linewidth=1.6,
        marker=look.marker if look.marks_noisy else dot,
        markersize=5,
        markevery=max(1, len(values) // MARKERS_PER_LINE),
    )


def draw_measured(
    panel: "Axes",
    tokens: np.ndarray,
    values: np.ndarray,
    look: Look,
    *,
    errors: np.ndarray | None = None,
) -> None:
    """Draw what was measured now and then, hollow markers on a thin line, its error as a band."""
    colour = look.validation_colour
    if errors is not None:
        known = np.nan_to_num(errors)
        band = {"color": colour, "alpha": 0.15, "linewidth": 0}
        panel.fill_between(tokens, values - known, values + known, **band)
    panel.plot(
        tokens,
        values,
        color=colour,
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
    """Draw published figures as dashed lines, each with its name where the fewest points are.

    The limits of the axes must have been set; `label` is the size of a name as shares of them.
    """
    scale = panel.transScale + panel.transLimits  # to shares of the axes
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


def _densely(tokens: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the points (N, 2) of a curve, with some on the lines between them."""
    known = np.isfinite(values)
    if not known.any():
        return np.zeros((0, 2))
    tokens, values = tokens[known], values[known]
    between = np.linspace(tokens[0], tokens[-1], POINTS_BETWEEN)
    x = np.concatenate([tokens, between])
    return np.column_stack([x, np.concatenate([values, np.interp(between, tokens, values)])])


def _emptiest_side(
    points: np.ndarray, height: float, label: tuple[float, float]
) -> tuple[bool, bool]:
    """Return whether a line's name belongs to its right end, and whether below it."""

    def covered(side: tuple[bool, bool]) -> int:
        right, below = side
        away = 1 - points[:, 0] if right else points[:, 0]
        up = height - points[:, 1] if below else points[:, 1] - height
        return int(((away < label[0]) & (up > 0) & (up < label[1])).sum())

    return min([(True, False), (True, True), (False, False), (False, True)], key=covered)


def draw_events(panel: "Axes", rows: Rows, look: Look, *, place: int) -> None:
    """Draw what happened to a run as marks above the x axis, those of run `place` in its row."""
    events = [row for row in rows if row["kind"] == "event"]
    for name in dict.fromkeys(row["event"] for row in events):
        tokens = [row["tokens"] for row in events if row["event"] == name]
        panel.plot(
            tokens,
            [0.03 + 0.05 * place] * len(tokens),
            transform=panel.get_xaxis_transform(),
            color=look.colour,
            marker=EVENT_MARKERS.get(name, OTHER_EVENT),
            markersize=6,
            linestyle="none",
            zorder=4,
        )


def event_entries(runs: Iterable[Rows]) -> list["Line2D"]:
    """Return the legend's entries of the events, each with its number."""
    from matplotlib.lines import Line2D

    names = Counter(row["event"] for rows in runs for row in rows if row["kind"] == "event")
    style = {"color": GREY, "linestyle": "none", "markersize": 6}
    return [
        Line2D([], [], marker=EVENT_MARKERS.get(name, OTHER_EVENT), label=label, **style)
        for name, label in ((n, f"{n.replace('_', ' ')} ({count:,})") for n, count in names.items())
    ]


def robust_limits(
    curves: Curves, lines: Iterable[float] = (), *, spike_share: float = SPIKE_SHARE
) -> tuple[float, float]:
    """Return the y limits that hold the curves but for their first share and their spikes.

    Those of `lines` that are not too far off are held as well.
    """
    kept = [np.zeros(0)]
    for tokens, values in curves:
        finite = np.isfinite(values)
        later = values[finite & _is_later(tokens)]
        later = later if len(later) >= FEWEST_LATER else values[finite]
        if len(later) >= FEWEST_WITH_SPIKES:
            later = later[later <= np.quantile(later, 1 - spike_share)]
        kept.append(later)
    values = np.concatenate(kept)
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    reach = max(FARTHEST_LINE * (high - low), NEAR_LINE * abs(high))
    near = [line for line in lines if low - reach <= line <= high + reach]
    low, high = min([low, *near]), max([high, *near])
    share = 0.12 if near else 0.06  # room for the name of a line at the edge
    margin = share * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _is_later(tokens: np.ndarray) -> np.ndarray:
    return tokens >= tokens.max(initial=0.0) * SKIPPED_SHARE


def tick(value: float, _position: object = None) -> str:
    """Return the text of a tick: 2.5B."""
    return human(value)
