"""Spikes of loss and gradient norm: told from the steps before, and what is done."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

SpikeAction = Literal["skip", "rollback"]


@dataclass(frozen=True)
class Limits:
    """Above which a step is a spike."""

    loss: float = math.inf
    """Nats per target token."""
    norm: float = math.inf
    """Of the gradient, before clipping."""


def spike_limits(recent: Sequence[Sequence[float]], *, sigma: float | None, window: int) -> Limits:
    """Return the limits after the steps `recent`: `(loss, gradient norm)` each, oldest first.

    A limit is the mean plus `sigma` standard deviations of the last `window` steps; before there
    are so many, or without `sigma`, there is none.
    """
    if sigma is None or len(recent) < window:
        return Limits()
    columns = zip(*recent[-window:], strict=True)
    return Limits(*(statistics.fmean(c) + sigma * statistics.pstdev(c) for c in columns))


def describe_skip(loss: float, grad_norm: float, limits: Limits) -> str:
    """Return why an update was left out."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return f"the gradient norm is {grad_norm}, the loss {loss}"
    if loss > limits.loss:
        return f"the loss {loss:.4f} is above {limits.loss:.4f}, the limit for a spike"
    return f"the gradient norm {grad_norm:.3g} is above {limits.norm:.3g}, the limit for a spike"
