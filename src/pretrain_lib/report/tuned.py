"""Draw a search for learning rates: the loss of every run over each of its rates."""

import math
from collections.abc import Mapping
from pathlib import Path

from pretrain_lib.report.curves import COLORS, MARKERS, STYLE, save_figure
from pretrain_lib.run_folder.metrics import human
from pretrain_lib.tuning.search import Trial

WIDTH, HEIGHT = 4.0, 3.6  # inches, of a panel


def draw_search(
    losses: Mapping[Trial, float], names: tuple[str, ...], best: Trial, path: Path, *, title: str
) -> None:
    """Write a PNG with a panel for each rate: validation losses by the length of the run.

    Runs that diverged are left out, and counted in the title.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    diverged = sum(not math.isfinite(loss) for loss in losses.values())
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH * len(names), HEIGHT), layout="constrained")
        panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
        for index, (panel, name) in enumerate(zip(panels, names, strict=True)):
            _fill(panel, losses, index)
            panel.axvline(best.rates[index], color=COLORS[-1], linewidth=0.8, linestyle="--")
            panel.set_xscale("log")
            panel.set_xlabel(f"optimizer.{name}")
            panel.set_title(f"best: {best.rates[index]:g}")
        panels[0].set_ylabel("Validation loss (nats per token)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=max(1, len(labels)))
        figure.suptitle(title + (f"; {diverged} runs diverged" if diverged else ""))
        save_figure(figure, path)


def _fill(panel: "object", losses: Mapping[Trial, float], index: int) -> None:
    lengths = sorted({trial.tokens for trial in losses})
    for place, tokens in enumerate(lengths):
        points = sorted(
            (trial.rates[index], loss)
            for trial, loss in losses.items()
            if trial.tokens == tokens and math.isfinite(loss)
        )
        if points:
            x, y = zip(*points, strict=True)
            panel.plot(
                x,
                y,
                linestyle="",
                markersize=5,
                label=f"{human(tokens)} tokens",
                color=COLORS[place % len(COLORS)],
                marker=MARKERS[place % len(MARKERS)],
            )
