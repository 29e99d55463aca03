"""Checkpoints written beside training: forward and backward go on meanwhile."""

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
from pretrain_lib.models.hf import Model
from pretrain_lib.tensors.pieces import find_holder


@dataclass(frozen=True)
class Saved:
    """What became of a save."""

    step: int
    path: Path | None
    """The checkpoint, unless it could not be written."""
    error: OSError | None
    seconds: float
    """From its beginning until it was committed."""


class CheckpointWriter:
    """Writes one checkpoint at a time in a thread of its own; on all processes of a run.

    The thread reads the live parameters and moments, so whoever changes them (the optimizer) has
    to `wait` first; forward and backward do not. `by_one` as in `collect_part`.
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
        by_one: bool = False,
        timeout: float = 1800.0,
    ) -> None:
        self.folder = folder
        self._fixed = {
            "tokenizer": tokenizer,
            "manifest": manifest,
            "keep_last": keep_last,
            "keep_every": keep_every,
        }
        self._by_one = by_one
        self._group = None if by_one else _group_of_writers(model, timeout)
        self._thread: threading.Thread | None = None
        self._saved: Saved | BaseException | None = None

    def start(self, state: TrainingState, model: Model, optimizer: torch.optim.Optimizer) -> None:
        """Begin to write the checkpoint of `state`; the one before must have been waited for.

        All processes call it together: what is sharded is gathered now.
        """
        assert self._thread is None, "a checkpoint is being written"
        part = collect_part(model, optimizer, by_one=self._by_one)
        if part is None:
            return
        stream = _stream_after(model.head_weight.device)
        work = (copy.deepcopy(state), part.using(self._group), stream)
        # A daemon: who interrupts a run twice does not wait for it.
        self._thread = threading.Thread(target=self._write, args=work, daemon=True, name="saver")
        self._thread.start()

    def wait(self) -> Saved | None:
        """Wait for the checkpoint that is being written, if any, and return what became of it."""
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
            if stream is not None:  # a thread begins on the first device, which is another's
                torch.cuda.set_device(stream.device)
            with torch.cuda.stream(stream):
                path = write_checkpoint(self.folder, state, part, **self._fixed)
        except OSError as problem:
            error = problem
        except BaseException as defect:  # `wait` raises it, where it is seen
            self._saved = defect
            return
        self._saved = Saved(state.step, path, error, time.monotonic() - started)


def _group_of_writers(model: Model, timeout: float) -> torch.distributed.ProcessGroup | None:
    """Return a group for the threads, apart from training's: the two would mix up messages."""
    holder = find_holder(model)
    if holder.count == 1:
        return None
    ranks, limit = list(holder.first_ranks), timedelta(seconds=timeout)
    return torch.distributed.new_group(ranks, backend="gloo", timeout=limit)


def _stream_after(device: torch.device) -> torch.cuda.Stream | None:
    """Return a stream for copies of what is queued now, beside what will be queued then."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream
