"""Profile some steps of a run (`system.profile`): a Chrome trace, a memory snapshot, a table."""

import gzip
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

PROFILE = "profile"  # folder in the run folder
TOP_OPERATORS = 12
NAME_WIDTH = 44


class StepProfiler:
    """Profiles the steps from `first` to `last`, both included, counted from 1.

    It writes `steps-F-L.json.gz`, a trace that chrome://tracing and Perfetto open, and on CUDA
    `steps-F-L.pickle`, the allocations of memory for https://pytorch.org/memory_viz. A run that
    resumes after the first of the steps profiles the rest of them.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path, device: torch.device) -> None:
        self._steps = steps
        self._folder = folder
        self._on_cuda = device.type == "cuda"
        self._running: profile | None = None
        self._first = 0

    def before(self, step: int) -> None:
        """Begin to profile, if `step` is the first of those asked for that this process runs."""
        if self._steps is None or self._running or not self._steps[0] <= step <= self._steps[1]:
            return
        activities = [ProfilerActivity.CPU]
        if self._on_cuda:
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history()
        self._first = step
        self._running = profile(activities=activities, profile_memory=True)
        self._running.start()

    def after(self, step: int) -> list[str]:
        """End after the last step; return the lines of a table, or none."""
        if self._running is None or step < self._steps[1]:
            return []
        self._running.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        name = self._folder / f"steps-{self._first}-{step}"
        _write_trace(self._running, name.with_suffix(".json"))
        if self._on_cuda:
            torch.cuda.memory._dump_snapshot(str(name.with_suffix(".pickle")))
            torch.cuda.memory._record_memory_history(enabled=None)
        lines = list(_table(self._running, steps=step - self._first + 1, on_cuda=self._on_cuda))
        self._steps = self._running = None
        return [*lines, f"wrote {name}.json.gz"]


def _write_trace(finished: profile, path: Path) -> None:
    finished.export_chrome_trace(str(path))
    with path.open("rb") as trace, gzip.GzipFile(f"{path}.gz", "wb") as packed:
        shutil.copyfileobj(trace, packed)
    path.unlink()


def _table(finished: profile, *, steps: int, on_cuda: bool) -> Iterator[str]:
    """Yield the operators that take most time, without that of the operators they call."""
    kind = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    events = sorted(finished.key_averages(), key=lambda event: -getattr(event, kind))
    total = sum(getattr(event, kind) for event in events) or 1
    device = "GPU" if on_cuda else "CPU"
    yield f"{'operator':<{NAME_WIDTH}} {'calls/step':>10} {f'{device} ms/step':>12} {'share':>6}"
    for event in events[:TOP_OPERATORS]:
        microseconds = getattr(event, kind)
        yield (
            f"{event.key[:NAME_WIDTH]:<{NAME_WIDTH}} {event.count / steps:>10,.1f} "
            f"{microseconds / 1e3 / steps:>12,.2f} {microseconds / total:>6.1%}"
        )
