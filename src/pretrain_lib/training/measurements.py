"""What a run measures of itself: the time that is left, its peak memory, what devices can do."""

import resource
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile

import torch
from accelerate import Accelerator

from pretrain_lib.config.settings import Recipe
from pretrain_lib.models.flops import device_peak

RECENT_STEPS = 50  # the steps from which the speed is taken
FEWEST_STEPS = 2  # measured steps, before which no time is told
SAVE, LAST_SAVE = "save", "last save"
VALIDATION, SCORING, SAMPLING = "validation", "scoring", "sampling"


@dataclass(frozen=True)
class Left:
    """The time that a run still takes."""

    seconds: float
    is_complete: bool
    """Whether everything that lies ahead has been measured; otherwise it takes longer."""


class TimeLeft:
    """Estimates the time that is left, only from what this process has measured.

    Steps after the first count, as its memory is allocated and its kernels are compiled. So do
    evaluations, and what each save adds to the step that it overlaps with.
    """

    def __init__(self) -> None:
        self._steps: deque[tuple[int, float]] = deque(maxlen=RECENT_STEPS)  # windows, seconds
        self._costs: dict[str, float] = {}  # seconds, of the latest of each kind
        self._saving: float | None = None  # seconds of a save so far, which the next step waits for
        self._is_first = True

    def note_step(self, *, windows: int, seconds: float) -> None:
        """Count a step of `windows` windows, with the wait for its data."""
        saving, self._saving = self._saving, None
        if self._is_first:
            self._is_first = False
        elif saving is None:
            self._steps.append((windows, seconds))
        elif self._steps:
            self._costs[SAVE] = saving + max(0.0, seconds - windows * self._seconds_per_window())

    def note_evaluation(self, kind: str, seconds: float) -> None:
        """Count a validation, a scoring, or samples."""
        self._costs[kind] = seconds

    def note_save_begun(self, seconds: float) -> None:
        """Count the start of a save, which the next step overlaps with and waits for."""
        self._saving = seconds

    def note_saved(self, seconds: float) -> None:
        """Count a whole save, from its start to its end: no step overlaps with the last one."""
        self._costs[LAST_SAVE] = seconds

    def estimate(self, *, windows: int, ahead: Mapping[str, int]) -> Left | None:
        """Return the time for `windows` windows and the given number of events of each kind.

        None if fewer than `FEWEST_STEPS` steps have been measured.
        """
        if len(self._steps) < FEWEST_STEPS:
            return None
        due = {kind: number for kind, number in ahead.items() if number > 0}
        seconds = windows * self._seconds_per_window()
        seconds += sum(number * self._costs.get(kind, 0.0) for kind, number in due.items())
        return Left(seconds, is_complete=due.keys() <= self._costs.keys())

    def _seconds_per_window(self) -> float:
        windows, seconds = map(sum, zip(*self._steps, strict=True))
        return seconds / windows


def events_ahead(
    config: Recipe, *, step: int, validates: bool, scores: bool, samples: bool
) -> dict[str, int]:
    """Return how many events of each kind are due from the end of step `step` on.

    The flags say whether the run has events of these kinds at all.
    """
    last, sizes = config.last_step(), config.batch_sizes()
    tokens = [sizes.before(s) * config.batch.sequence_length for s in (step - 1, last - 1)]
    every_tokens = config.checkpoint.every_tokens
    by_tokens = tokens[1] // every_tokens - tokens[0] // every_tokens if every_tokens else 0
    return {
        VALIDATION: validates * (1 + _multiples(config.validation.every, step, last)),
        SCORING: scores * (1 + _multiples(config.scores.every, step, last)),
        SAMPLING: samples * (1 + _samples_between(config, step, last)),
        SAVE: _multiples(config.checkpoint.every, step, last) + by_tokens,
        LAST_SAVE: 1,
    }


def _multiples(every: int | None, first: int, end: int) -> int:
    """Return how many multiples of `every` lie in `range(first, end)`, `first` at least 1."""
    return max(0, (end - 1) // every - (first - 1) // every) if every else 0


def _samples_between(config: Recipe, first: int, end: int) -> int:
    settings = config.samples
    if settings.growth == 1:
        return _multiples(settings.every, first, end)
    return sum(due >= first for due in takewhile(lambda due: due < end, settings.due_steps()))


@dataclass(frozen=True)
class Memory:
    """The most memory that this process has held at once, so far."""

    kind: str
    """GPU: tensors on the device. RAM: the resident memory of the process."""
    peak_bytes: int
    """0 if unknown."""

    def gigabytes(self) -> str:
        """Return the peak in GB of 10^9 bytes, with three digits."""
        number = self.peak_bytes / 1e9
        return f"{number:.{2 if number < 9.995 else 1 if number < 99.95 else 0}f}"


def peak_memory(device: torch.device) -> Memory:
    """Return the peak memory of this process on `device`; on MPS, what is allocated now."""
    if device.type == "cuda":
        return Memory("GPU", torch.cuda.max_memory_allocated(device))
    if device.type == "mps":
        return Memory("GPU", torch.mps.driver_allocated_memory())
    unit = 1 if sys.platform == "darwin" else 1024  # bytes; kilobytes elsewhere
    return Memory("RAM", unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def peak_of_all(accelerator: Accelerator) -> float | None:
    """Return the peak FLOP/s of all devices together, for `mfu`; None if unknown."""
    # Of float8, which few devices have, the rate in bf16 is the reference; a CPU emulates it.
    emulated = accelerator.mixed_precision == "fp8" and accelerator.device.type == "cpu"
    in_fp32 = accelerator.mixed_precision == "no" or emulated
    peak = device_peak(accelerator.device, torch.float32 if in_fp32 else torch.bfloat16)
    return None if peak is None else peak * accelerator.num_processes
