"""Learning rate and batch size as pure functions of the step: no state to save.

Steps count from 0; a step is one optimizer update.
"""

import math
from dataclasses import dataclass
from typing import Literal

from pretrain_lib.values import check_value
from pretrain_lib.wording import plural

ScheduleKind = Literal["cosine", "linear", "constant", "wsd"]
DecayShape = Literal["linear", "cosine", "1-sqrt"]


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up to `peak`, then decay of shape `kind` to `floor` at `total_steps`.

    "constant" stays at the peak. "wsd" (warm-up, stable, decay; Hu et al. 2024) stays at the peak
    and decays over the last `decay_steps`, in the shape `decay_shape`; 1-sqrt is that of Haegele et
    al. 2024. After `total_steps` all other kinds stay at the floor.
    """

    kind: ScheduleKind
    peak: float
    floor: float
    warmup_steps: int
    total_steps: int
    decay_steps: int = 0
    decay_shape: DecayShape = "linear"

    def __post_init__(self) -> None:
        check_value(self.kind, "schedule.kind", ScheduleKind)
        check_value(self.decay_shape, "schedule.decay_shape", DecayShape)
        for name in ("warmup_steps", "total_steps", "decay_steps"):
            self._take(name, int, minimum=0)
        self._take("peak", float, minimum=0)
        self._take("floor", float, minimum=0, maximum=self.peak)
        decays = self.kind == "wsd"
        if self.warmup_steps + decays * self.decay_steps > self.total_steps:
            decay = f" and decay ({plural(self.decay_steps, 'step')}) do" if decays else " does"
            raise ValueError(
                f"warm-up ({plural(self.warmup_steps, 'step')}){decay} not fit the schedule of "
                f"{plural(self.total_steps, 'step')}: shorten schedule.warmup_tokens or "
                f"schedule.warmup_fraction"
                f"{', schedule.decay_tokens or schedule.decay_fraction' * decays}, or lengthen "
                f"schedule.tokens"
            )

    def _take(self, name: str, kind: type, **limits: float) -> None:
        object.__setattr__(self, name, check_value(getattr(self, name), name, kind, **limits))

    def __call__(self, step: int) -> float:
        """Return the learning rate of `step`."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return self.peak
        if step >= self.total_steps:
            return self.floor
        start = self.total_steps - self.decay_steps if self.kind == "wsd" else self.warmup_steps
        if step < start:
            return self.peak
        progress = (step - start) / (self.total_steps - start)
        shape = self.decay_shape if self.kind == "wsd" else self.kind
        return self.floor + _remaining(shape, progress) * (self.peak - self.floor)


def _remaining(shape: str, progress: float) -> float:
    """Return the share of the way from floor to peak that is left, `progress` from 0 to 1."""
    if shape == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - math.sqrt(progress) if shape == "1-sqrt" else 1 - progress


@dataclass(frozen=True)
class BatchSizes:
    """The batch size of each step in windows: a ramp from `initial` to `full`, then `full`.

    The ramp (Brown et al. 2020, section 2.3) has one stage for each size, `increment` apart. All
    stages together consume about `ramp_windows`: each an equal share, rounded to whole steps.
    """

    full: int  # windows per step
    initial: int = 0  # windows; 0 for no ramp
    increment: int = 0  # windows
    ramp_windows: int = 0

    def __post_init__(self) -> None:
        if self.initial and (
            self.increment <= 0
            or self.initial > self.full
            or (self.full - self.initial) % self.increment
        ):
            raise ValueError(
                f"batch.ramp_from ({self.initial} windows) must reach batch.tokens ({self.full} "
                f"windows) in whole steps of batch.ramp_increment ({self.increment} windows)"
            )

    def _stages(self) -> list[tuple[int, int]]:
        """Return `(windows per step, steps)` for each size below `full`."""
        if not self.initial or self.initial == self.full:
            return []
        sizes = range(self.initial, self.full, self.increment)
        share = self.ramp_windows / len(sizes)
        return [(size, max(1, round(share / size))) for size in sizes]

    def at(self, step: int) -> int:
        """Return the number of windows that `step` consumes."""
        return self.before(step + 1) - self.before(step)

    def before(self, step: int) -> int:
        """Return the number of windows that all steps before `step` consume."""
        consumed = 0
        for size, steps in self._stages():
            if step <= steps:
                return consumed + step * size
            consumed, step = consumed + steps * size, step - steps
        return consumed + step * self.full

    def steps_within(self, windows: int) -> int:
        """Return the number of whole steps that `windows` suffice for."""
        steps = 0
        for size, stage_steps in self._stages():
            affordable = min(stage_steps, windows // size)
            steps, windows = steps + affordable, windows - affordable * size
        return steps + windows // self.full
