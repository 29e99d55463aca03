"""What the runs of `learning.py` say together: ratios of tokens, a fit, and a picture of both."""

import itertools
import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

BASELINE = "adamw"
NAMES = {
    "adamw": "GPT-2, AdamW",
    "muon": "GPT-2, Muon",
    "qwen3": "Qwen3, Muon",
}
GOALS = {"muon": 0.6, "qwen3": 0.45}  # of the baseline's tokens, at the largest size
FAR_PARAMETERS, FAR_TOKENS = 124e6, 2.5e9  # to which the fit is extrapolated
DRAWS = 100  # of the bootstrap
GRID = tuple(step / 25 for step in range(1, 26))  # exponents that are tried


@dataclass(frozen=True)
class Point:
    """The losses of one size and horizon over the seeds."""

    contender: str
    width: int
    parameters: int
    tokens: int
    losses: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.mean(self.losses)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds; 0 if there is one."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 else 0.0


@dataclass(frozen=True)
class Fit:
    """L(N, D) = floor + a N^-alpha + b D^-beta, with N parameters and D tokens."""

    floor: float
    a: float
    alpha: float
    b: float
    beta: float

    def __str__(self) -> str:
        sizes = f"{self.a:.3g} N^-{self.alpha:g}"
        return f"{self.floor:.3g} + {sizes} + {self.b:.3g} D^-{self.beta:g}"

    def __call__(self, parameters: float, tokens: float) -> float:
        return self.floor + self.a * parameters**-self.alpha + self.b * tokens**-self.beta


def points_of(runs: list[dict]) -> list[Point]:
    """Gather runs by contender, size and horizon; those of a search are not marked `compared`."""
    grouped: dict[tuple, dict[int, float]] = defaultdict(dict)
    for run in runs:
        if run["compared"]:
            key = (run["contender"], run["width"], run["parameters"], run["tokens"])
            grouped[key][run["seed"]] = run["loss"]
    return [Point(*key, tuple(losses.values())) for key, losses in sorted(grouped.items())]


def tokens_to_reach(loss: float, curve: list[tuple[int, float]]) -> tuple[float, bool]:
    """Return the tokens after which a curve of `(tokens, loss)` reaches a loss.

    Between points, and beyond them along the nearest two, the loss is linear in the logarithm of
    the tokens. The second value says whether the loss lies beyond the points.
    """
    curve = sorted(curve)
    pairs = list(itertools.pairwise(curve))
    inside = [p for p in pairs if p[1][1] <= loss <= p[0][1]]
    (x0, y0), (x1, y1) = (inside or [pairs[0] if loss > curve[0][1] else pairs[-1]])[0]
    share = (loss - y0) / (y1 - y0)
    return math.exp(math.log(x0) + share * math.log(x1 / x0)), not inside


@dataclass(frozen=True)
class Ratio:
    """Tokens to the baseline's loss, as a share of the baseline's tokens."""

    contender: str
    width: int
    tokens: int
    value: float
    spread: float
    """Standard deviation over the seeds."""
    beyond: bool
    """Whether the loss lies beyond the contender's own runs."""


def ratios(points: list[Point]) -> list[Ratio]:
    """Return the ratio of each contender to the baseline, by width and the baseline's horizon."""
    found = []
    by_curve: dict[tuple, list[Point]] = defaultdict(list)
    for point in points:
        by_curve[point.contender, point.width].append(point)
    for (contender, width), curve in sorted(by_curve.items()):
        if contender == BASELINE or len(curve) < 2:
            continue
        for base in by_curve.get((BASELINE, width), ()):
            seeds = min(len(base.losses), *(len(point.losses) for point in curve))
            values = []
            for seed in range(seeds):
                own = [(point.tokens, point.losses[seed]) for point in curve]
                tokens, _ = tokens_to_reach(base.losses[seed], own)
                values.append(tokens / base.tokens)
            mean = [(point.tokens, point.mean) for point in curve]
            tokens, beyond = tokens_to_reach(base.mean, mean)
            spread = statistics.stdev(values) if seeds > 1 else 0.0
            value = tokens / base.tokens
            found.append(Ratio(contender, width, base.tokens, value, spread, beyond))
    return found


def fit_law(points: list[Point], losses: list[float] | None = None) -> Fit:
    """Fit L(N, D) to the means, or to the given losses: exponents on a grid, the rest exactly."""
    y = np.array(losses or [point.mean for point in points])
    n = np.array([point.parameters for point in points], dtype=float)
    d = np.array([point.tokens for point in points], dtype=float)
    best, chosen = math.inf, None
    for alpha, beta in itertools.product(GRID, GRID):
        columns = np.stack([np.ones_like(y), n**-alpha, d**-beta], axis=1)
        scale = columns.max(axis=0)
        solved, *_ = np.linalg.lstsq(columns / scale, y, rcond=None)
        error = float(((columns / scale) @ solved - y) @ ((columns / scale) @ solved - y))
        floor, a, b = solved / scale
        if error < best and min(floor, a, b) >= 0:
            best, chosen = error, Fit(floor, a, alpha, b, beta)
    assert chosen is not None, "no exponents give a falling loss"
    return chosen


def extrapolate(points: list[Point], *, seed: int = 0) -> tuple[float, float, float]:
    """Return the fitted loss at `FAR_PARAMETERS` and `FAR_TOKENS`, and its 5th and 95th percentile.

    The percentiles are those of fits to losses drawn from each point's seeds, with the residuals of
    the fit shuffled among the points.
    """
    draw = np.random.default_rng(seed)
    fit = fit_law(points)
    fitted = np.array([fit(point.parameters, point.tokens) for point in points])
    residuals = np.array([point.mean for point in points]) - fitted
    far = []
    for _ in range(DRAWS):
        noise = draw.choice(residuals, len(points))
        noise += [draw.normal(0, p.spread / len(p.losses) ** 0.5) for p in points]
        far.append(fit_law(points, list(fitted + noise))(FAR_PARAMETERS, FAR_TOKENS))
    low, high = np.percentile(far, [5, 95])
    return fit(FAR_PARAMETERS, FAR_TOKENS), float(low), float(high)


def report(content: dict, out: Path) -> None:
    """Print what there is, and draw it beside the file of the runs."""
    points = points_of(list(content["runs"].values()))
    print(
        f"{'':<16}{'width':>6}{'parameters':>12}{'tokens':>10}{'loss':>9}{'spread':>8}{'seeds':>6}"
    )
    for p in points:
        print(
            f"{NAMES[p.contender]:<16}{p.width:>12}{p.parameters:>12,}{p.tokens:>12,}"
            f"{p.mean:>12.4f}{p.spread:>12.4f}{len(p.losses):>12}"
        )
    print("\ntokens to the loss of AdamW, as a share of AdamW's")
    for r in ratios(points):
        mark = " (beyond its own runs)" if r.beyond else ""
        print(
            f"{NAMES[r.contender]:<16}{r.width:>6}{r.tokens:>12,}{r.value:>9.2f} +- {r.spread:.2f}"
            f"{mark}"
        )
    for contender in NAMES:
        own = [p for p in points if p.contender == contender]
        if len({p.width for p in own}) > 2 and len({p.tokens for p in own}) > 2:
            far, low, high = extrapolate(own)
            print(
                f"{NAMES[contender]}: {fit_law(own)}; extrapolated to {FAR_PARAMETERS:.3g} "
                f"parameters and {FAR_TOKENS:.3g} tokens: {far:.2f} ({low:.2f} to {high:.2f})"
            )
    if points:
        draw(points, out.with_suffix(".png"))


def draw(points: list[Point], path: Path) -> None:
    """Draw the losses over the tokens, a panel for each width."""
    from matplotlib.figure import Figure

    widths = sorted({p.width for p in points})
    figure = Figure(figsize=(4 * len(widths), 3.8), layout="constrained")
    panels = figure.subplots(1, len(widths), sharey=True, squeeze=False)[0]
    for panel, width in zip(panels, widths, strict=True):
        for contender, name in NAMES.items():
            own = [p for p in points if (p.contender, p.width) == (contender, width)]
            if own:
                x, y, e = zip(*((p.tokens, p.mean, p.spread) for p in own), strict=True)
                panel.errorbar(x, y, e, marker="o", capsize=3, label=name)
        parameters = max(p.parameters for p in points if p.width == width)
        panel.set_xscale("log", base=2)
        panel.set_title(f"width {width}, {parameters / 1e6:.2f}M parameters")
        panel.set_xlabel("tokens")
    panels[0].set_ylabel("Validation loss (nats per token)")
    panels[0].legend()
    figure.savefig(path, dpi=150)
