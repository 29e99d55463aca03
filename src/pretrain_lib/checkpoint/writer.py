"""Asynchronous checkpoints: a thread writes them while forward and backward continue."""

import copy
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

from pretrain_lib.checkpoint.parts import Part, collect_part
from pretrain_lib.checkpoint.state import TrainingState, write_checkpoint
from pretrain_lib.data.text.tokenizer import Tokenizer
from pretrain_lib.models.interface import Model
from pretrain_lib.tensors.pieces import find_holder


@dataclass(frozen=True)
class Saved:
    """The outcome of a save."""

    step: int
    path: Path | None
    """The checkpoint, or None if it could not be written."""
    error: OSError | None
    seconds: float
    """From the start of the save to its commit or error."""


class CheckpointWriter:
    """Writes checkpoints in a background thread, one at a time; used on all processes of a run.

    The thread reads the live parameters and moments, so call `wait` before changing them (the
    optimizer step); forward and backward may run meanwhile. `by_one` is that of `collect_part`,
    `timeout` is in seconds and applies to the collectives of the writers.
    """

    def __init__(
        self,
        folder: Path,
        model: Model,
        *,
        tokenizer: Tokenizer | None,
        manifest: dict,
        keep_last: int = 0,
        keep_every: int | None = None,
        keep_best: str | None = None,
        by_one: bool = False,
        timeout: float = 1800.0,
    ) -> None:
        self.folder = folder
        self._fixed = {
            "tokenizer": tokenizer,
            "manifest": manifest,
            "keep_last": keep_last,
            "keep_every": keep_every,
            "keep_best": keep_best,
        }
        self._by_one = by_one
        self._group = None if by_one else _group_of_writers(model, timeout)
        self._thread: threading.Thread | None = None
        self._saved: Saved | BaseException | None = None

    def start(self, state: TrainingState, model: Model, optimizer: torch.optim.Optimizer) -> None:
        """Start writing the checkpoint of `state`; `wait` for the previous one first.

        All processes must call this together: sharded tensors are gathered before it returns.
        """
        assert self._thread is None, "a checkpoint is being written"
        part = collect_part(model, optimizer, by_one=self._by_one)
        if part is None:
            return
        stream = _stream_after(model.head_weight.device)
        work = (copy.deepcopy(state), part.using(self._group), stream)
        # A daemon thread, so that interrupting a run twice does not wait for it.
        self._thread = threading.Thread(target=self._write, args=work, daemon=True, name="saver")
        self._thread.start()

    def wait(self) -> Saved | None:
        """Wait for the checkpoint being written, if any, and return the outcome.

        Raises whatever the thread raised, except for an OSError, which is in the outcome.
        """
        if self._thread is None:
            return None
        self._thread.join()
        self._thread, saved = None, self._saved
        if isinstance(saved, BaseException):
            raise saved
        return saved

    def _write(self, state: TrainingState, part: Part, stream: torch.cuda.Stream | None) -> None:
        started, path, error = time.monotonic(), None, None
        try:
            if stream is not None:  # a new thread starts on device 0, not on that of this rank
                torch.cuda.set_device(stream.device)
            with torch.cuda.stream(stream):
                path = write_checkpoint(self.folder, state, part, **self._fixed)
        except OSError as problem:
            error = problem
        except BaseException as defect:  # raised again by `wait`
            self._saved = defect
            return
        self._saved = Saved(state.step, path, error, time.monotonic() - started)


def _group_of_writers(model: Model, timeout: float) -> torch.distributed.ProcessGroup | None:
    """Return a process group for the writer threads, or None if there is a single writer.

    Collectives of two threads in one group could mix, so it is not that of training.
    """
    holder = find_holder(model)
    if holder.count == 1:
        return None
    ranks, limit = list(holder.first_ranks), timedelta(seconds=timeout)
    return torch.distributed.new_group(ranks, backend="gloo", timeout=limit)


def _stream_after(device: torch.device) -> torch.cuda.Stream | None:
    """Return a CUDA stream that waits for the work queued so far, but for none queued later."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream
