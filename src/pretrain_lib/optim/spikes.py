"""Detect spikes of loss and gradient norm from the statistics of the preceding steps."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

SpikeAction = Literal["skip", "rollback"]


@dataclass(frozen=True)
class Limits:
    """Limits above which a step counts as a spike."""

    loss: float = math.inf
    """Loss in nats per target token."""
    norm: float = math.inf
    """Gradient norm, before clipping."""


def spike_limits(recent: Sequence[Sequence[float]], *, sigma: float | None, window: int) -> Limits:
    """Return the spike limits, given the `(loss, gradient norm)` of recent steps, oldest first.

    Each limit is the mean plus `sigma` standard deviations over the last `window` steps. With fewer
    steps, or if `sigma` is None, the limits are infinite.
    """
    if sigma is None or len(recent) < window:
        return Limits()
    columns = zip(*recent[-window:], strict=True)
    return Limits(*(statistics.fmean(c) + sigma * statistics.pstdev(c) for c in columns))


def describe_skip(loss: float, grad_norm: float, limits: Limits) -> str:
    """Return the reason why an update was skipped."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return f"the gradient norm is {grad_norm}, the loss {loss}"
    if loss > limits.loss:
        return f"the loss {loss:.4f} is above {limits.loss:.4f}, the limit for a spike"
    return f"the gradient norm {grad_norm:.3g} is above {limits.norm:.3g}, the limit for a spike"
