"""Choose the learning rates to try: successive halving, then one rate at a time.

The search is a pure function of the losses, so a search that was cut short is continued by
repeating it with the losses that are known.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

SPREAD = 8.0  # the candidates lie within this factor of the recipe's own rates, on either side
CANDIDATES = 9  # in the first round, for each rate
KEPT = 3  # a third of the candidates goes on, to runs that are this many times as long
ROUNDS = 3
STEP = 2.0  # factor between the neighbors that are compared one rate at a time
MOST_STEPS = 4  # beyond the first neighbor, in one direction
DIGITS = 3  # of a rate that is tried


@dataclass(frozen=True)
class Trial:
    """A run with certain learning rates, from its first step to the end of its own schedule."""

    rates: tuple[float, ...]
    tokens: int


@dataclass(frozen=True)
class Space:
    """What is searched."""

    center: tuple[float, ...]
    """The rates around which the search begins."""
    tokens: int
    """Tokens of the longest runs; a multiple of `KEPT ** (ROUNDS - 1)` steps."""
    seed: int = 0

    @property
    def first_tokens(self) -> int:
        """Tokens of the runs of the first round."""
        return self.tokens // KEPT ** (ROUNDS - 1)


@dataclass(frozen=True)
class Found:
    """The result of a search."""

    trial: Trial
    """The best of the longest runs."""
    loss: float
    """Its validation loss, nats per token."""


Evaluate = Callable[[Trial], float]


def find_rates(space: Space, evaluate: Evaluate) -> Found:
    """Return the rates of the lowest loss; `evaluate` is called once for each trial, in order.

    Candidates are compared in rounds of ever fewer and longer runs (successive halving, Jamieson
    and Talwalkar 2016). Around the best, each rate is then halved and doubled until the loss
    rises, and the minimum of the parabola through the best three gives the rate. A loss that is
    not finite counts as worse than all others.
    """
    losses: dict[Trial, float] = {}

    def measure(trial: Trial) -> float:
        if trial not in losses:
            loss = evaluate(trial)
            losses[trial] = loss if math.isfinite(loss) else math.inf
        return losses[trial]

    best = _halve(space, measure)
    offsets = []
    for index in range(len(space.center)):
        best, offset = search_line(best, index, measure)
        offsets.append(offset)
    rates = [rate * STEP**offset for rate, offset in zip(best.rates, offsets, strict=True)]
    measure(replace(best, rates=_rounded(rates)))
    longest = [trial for trial in losses if trial.tokens == space.tokens]
    winner = min(longest, key=losses.__getitem__)
    return Found(winner, losses[winner])


def expected_trials(space: Space) -> list[int]:
    """Return the tokens of each trial of a search whose first neighbors are worse."""
    number, tokens = CANDIDATES * len(space.center), space.first_tokens
    trials = []
    for _ in range(ROUNDS):
        trials += [tokens] * number
        number, tokens = number // KEPT, tokens * KEPT
    return trials + [space.tokens] * (2 * len(space.center) + 1)


def candidates(space: Space) -> list[tuple[float, ...]]:
    """Return the rates of the first round: the center, and points spread evenly around it.

    The points are those of a scrambled Sobol sequence on logarithmic axes.
    """
    dimension = len(space.center)
    engine = torch.quasirandom.SobolEngine(dimension, scramble=True, seed=space.seed)
    points = (2 * engine.draw(CANDIDATES * dimension - 1, dtype=torch.float64) - 1).tolist()
    spread = [
        _rounded(rate * SPREAD**x for rate, x in zip(space.center, point, strict=True))
        for point in points
    ]
    return [_rounded(space.center), *spread]


def search_line(start: Trial, index: int, measure: Evaluate) -> tuple[Trial, float]:
    """Vary one rate by factors of `STEP`; return the best trial, and the parabola's offset from it.

    The offset is in steps, at most half a one.
    """

    def at(place: int) -> Trial:
        rates = list(start.rates)
        rates[index] *= STEP**place
        return replace(start, rates=_rounded(rates)) if place else start

    places = {place: measure(at(place)) for place in (0, -1, 1)}
    while (best := min(places, key=places.__getitem__)) in (min(places), max(places)):
        if abs(best) > MOST_STEPS:
            return at(best), 0.0
        further = best + (1 if best > 0 else -1)
        places[further] = measure(at(further))
    return at(best), vertex(*(places[best + side] for side in (-1, 0, 1)))


def _halve(space: Space, measure: Evaluate) -> Trial:
    """Return the best trial of the last round."""
    tokens = space.first_tokens
    trials = [Trial(rates, tokens) for rates in candidates(space)]
    for number in range(ROUNDS):
        trials.sort(key=measure)  # stable: of equal losses the earlier candidate is preferred
        if not math.isfinite(measure(trials[0])):
            raise ValueError(
                f"none of the {len(trials)} runs of {tokens:,} tokens came to a finite loss: lower "
                f"the recipe's learning rates, around which the search begins"
            )
        if number < ROUNDS - 1:
            tokens *= KEPT
            trials = [Trial(trial.rates, tokens) for trial in trials[: len(trials) // KEPT]]
    return trials[0]


def vertex(left: float, middle: float, right: float) -> float:
    """Return the place of the minimum of the parabola through (-1, left), (0, middle), (1, right).

    `middle` is the lowest. A side that is not finite says nothing: the result is then 0.
    """
    curvature = left - 2 * middle + right
    if not math.isfinite(curvature) or curvature <= 0:
        return 0.0
    return 0.5 * (left - right) / curvature


def round_rate(rate: float) -> float:
    """Return a rate with the digits of those that are tried."""
    return float(f"{rate:.{DIGITS - 1}e}")


def _rounded(rates: "list[float] | tuple[float, ...]") -> tuple[float, ...]:
    return tuple(map(round_rate, rates))
