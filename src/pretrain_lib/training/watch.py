"""When to stop early: signals and the time budget."""

import os
import signal
import time
from types import FrameType

import torch
from accelerate import Accelerator

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STARTED = "PRETRAIN_LIB_STARTED"  # seconds since the epoch, set when the command starts


class StopWatch:
    """Notes signals and the time used; `reason()` says at a step boundary whether to stop.

    The second SIGINT stops at once.
    """

    def __init__(
        self, accelerator: Accelerator, *, max_time: float | None = None, expected_save: float = 0.0
    ) -> None:
        self.accelerator = accelerator
        self.max_time = max_time
        self.started = float(os.environ.get(STARTED, time.time()))
        self.longest_save = expected_save  # seconds, until one was measured
        self.longest_step = 0.0
        self.longest_evaluation = 0.0  # with samples
        self._signal: int | None = None
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = self._signal or number

    def reason(self, *, evaluation_next: bool = False) -> str | None:
        """Return why to stop now, the same on all ranks; None to go on.

        `evaluation_next` says whether an evaluation would follow the next step.
        """
        number, end = self._signal or 0, self._expected_end(evaluation_next)
        over = self.max_time is not None and end > self.max_time
        if self.accelerator.num_processes > 1:
            flags = torch.tensor([[number, int(over)]], device=self.accelerator.device)
            number, over = self.accelerator.gather(flags).amax(dim=0).tolist()
        if number:
            return f"signal {signal.Signals(number).name}"
        return f"run.max_time={self.max_time:g}s is used up" if over else None

    def _expected_end(self, evaluation_next: bool) -> float:
        """Return the seconds used if one more step, what is due after it and a save follow."""
        margin = 1.5 * self.longest_step + 2 * self.longest_save
        margin += 1.5 * self.longest_evaluation if evaluation_next else 0
        return time.time() - self.started + margin

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
