"""Log the metrics of a run to `metrics.jsonl`, the console and experiment trackers."""

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm

from pretrain_lib.config.rules import dotted
from pretrain_lib.files.writes import flush, naming
from pretrain_lib.run_folder.cut import drop_rows_after
from pretrain_lib.wording import in_line


class Metrics:
    """Writes the metrics rows of a run on the main process; does nothing on the others.

    A row is a dict with `kind` (train, validation, evaluation, event), `step` and `tokens`.
    """

    def __init__(
        self, path: Path, accelerator: Accelerator, *, total_steps: int, step: int = 0
    ) -> None:
        self.path = path
        self.accelerator = accelerator
        self.total_steps = total_steps
        self.is_main, self._tracks = accelerator.is_main_process, True
        if self.is_main:
            self._file = path.open("a", encoding="utf-8")
        self._bar = tqdm(
            total=total_steps,
            initial=step,
            unit="step",
            bar_format="{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}, {elapsed} since start",
            disable=not self.is_main or not sys.stderr.isatty(),
            dynamic_ncols=True,
        )

    def write(self, row: dict) -> None:
        """Append a row to `metrics.jsonl` and log its numbers to the trackers."""
        if not self.is_main:
            return
        # JSON has neither NaN nor infinity: write null.
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
        }
        with naming(self.path):
            self._file.write(json.dumps(finite) + "\n")
            self._file.flush()
        numbers = {
            f"{row['kind']}/{key}": value
            for key, value in finite.items()
            if isinstance(value, int | float) and key != "step"
        }
        if self._tracks:
            self._track(lambda: self.accelerator.log(numbers, step=row["step"]))

    def _track(self, action: Callable[[], None]) -> None:
        """Call a function of the trackers, until one fails: no run ends because of a tracker."""
        try:
            action()
        except Exception as error:  # each tracker has its own types
            self._tracks = False
            reason = in_line(f"{type(error).__name__}: {error}")
            self.say(
                f"warning: a tracker of log.trackers has failed ({reason}) and gets no more rows; "
                f"{self.path} has them all"
            )

    def end_trackers(self) -> None:
        """End the trackers, and the process group."""
        self._track(self.accelerator.end_training)

    def say(self, text: str) -> None:
        """Print text above the progress bar, escaping what the console's encoding lacks."""
        if self.is_main:
            encoding = sys.stdout.encoding or "utf-8"
            printable = text.encode(encoding, "backslashreplace").decode(encoding)
            tqdm.write(printable, file=sys.stdout)
            sys.stdout.flush()

    def advance(self) -> None:
        """Move the progress bar by one step."""
        self._bar.update()

    def rewind(self, step: int) -> None:
        """Drop the rows after `step`, to which the run has rolled back."""
        self._bar.n = step
        self._bar.refresh()
        if self.is_main:
            self._file.close()
            drop_rows_after(self.path, step)
            self._file = self.path.open("a", encoding="utf-8")

    def sync(self) -> None:
        """Fsync the rows and the names in the run folder, among them that of the samples.

        A checkpoint must not survive a crash that loses the rows before it. Raises OSError if the
        file is gone, for there the run must not go on.
        """
        if self.is_main:
            with naming(self.path):
                os.fsync(self._file.fileno())
            self.path.stat()
            flush(self.path.parent)

    def close(self) -> None:
        """Close the file and the progress bar."""
        self._bar.close()
        if self.is_main:
            self._file.close()


def start_trackers(accelerator: Accelerator, settings: dict, *, run_id: str) -> None:
    """Start Accelerate's trackers, if any are configured, and log the settings by dotted name.

    Trackers that identify runs by an id (wandb, trackio) continue the run `run_id`.
    """
    if accelerator.log_with:
        options = {
            # By default wandb writes into the working directory.
            "wandb": {"dir": settings["run"]["dir"], "id": run_id, "resume": "allow"},
            "trackio": {"name": run_id, "resume": "allow"},
        }
        flat = {
            name: value if isinstance(value, int | float) else str(value)
            for name, value in dotted(settings)
            if not isinstance(value, dict)
        }
        accelerator.init_trackers("pretrain_lib", config=flat, init_kwargs=options)


def perplexity(loss: float) -> float:
    """Return exp(loss) of a loss in nats; infinity if that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def human(number: float, *, digits: int = 4) -> str:
    """Format a count in `digits` significant digits with a unit suffix: 1.31M."""
    number = float(f"{number:.{digits - 1}e}")
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.{digits}g}{unit}"
    return f"{number:.{digits}g}"


def human_time(seconds: float) -> str:
    """Format a duration: 2d03h, 1h05m, 2m10s, 45s."""
    seconds = round(seconds)
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60)):
        if seconds >= size:
            return f"{seconds // size}{unit}{seconds % size // part:02d}{smaller}"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"
