"""Stop a run early, on a signal or when the time budget is used up."""

import os
import signal
import time
from types import FrameType

import torch
from accelerate import Accelerator

from pretrain_lib.errors import heard_signals

STARTED = "PRETRAIN_LIB_STARTED"  # seconds since the epoch, set when the command starts


class StopWatch:
    """Records signals and elapsed time; call `reason()` between steps to find out whether to stop.

    A second SIGINT raises KeyboardInterrupt immediately.
    """

    def __init__(
        self, accelerator: Accelerator, *, max_time: float | None = None, expected_save: float = 0.0
    ) -> None:
        self.accelerator = accelerator
        self.max_time = max_time
        # From here on by a clock that nobody sets back.
        self._earlier = max(0.0, time.time() - float(os.environ.get(STARTED, time.time())))
        self._opened = time.monotonic()
        self.longest_save = expected_save  # seconds, assumed until a save has been measured
        self.longest_step = 0.0
        self.longest_evaluation = 0.0  # seconds, with scores and samples
        self._signal: int | None = None
        self._previous = {number: signal.signal(number, self._note) for number in heard_signals()}

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = self._signal or number

    def reason(self, *, evaluation_next: bool = False) -> str | None:
        """Return the reason to stop now, or None to continue; the same on all ranks.

        `evaluation_next` says whether an evaluation would follow the next step.
        """
        number, end = self._signal or 0, self._expected_end(evaluation_next)
        over = self.max_time is not None and end > self.max_time
        if self.accelerator.num_processes > 1:
            # Filled on the device: a copy from here would wait for it once more.
            device = self.accelerator.device
            flags = [torch.full((1, 1), flag, device=device) for flag in (number, int(over))]
            number, over = self.accelerator.gather(torch.cat(flags, dim=1)).amax(dim=0).tolist()
        if number:
            return f"signal {signal.Signals(number).name}"
        return f"run.max_time={self.max_time:g}s is used up" if over else None

    def has_signal(self) -> bool:
        """Return whether a process has a signal to stop; the same on all ranks."""
        number, device = self._signal or 0, self.accelerator.device
        if self.accelerator.num_processes > 1:
            number = self.accelerator.gather(torch.full((1,), number, device=device)).amax()
        return bool(number)

    def _expected_end(self, evaluation_next: bool) -> float:
        """Return the expected run time in seconds after another step, its evaluation and a save."""
        margin = 1.5 * self.longest_step + 2 * self.longest_save
        margin += 1.5 * self.longest_evaluation if evaluation_next else 0
        return self._earlier + time.monotonic() - self._opened + margin

    def close(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
