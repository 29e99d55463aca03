"""Checkpoints written beside training: forward and backward go on meanwhile. Floor 6."""

import copy
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from pretrain_lib.checkpoint import TrainingState, save_checkpoint
from pretrain_lib.data.tokenizer import Tokenizer
from pretrain_lib.models.hf import Model


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
    """Writes one checkpoint at a time in a thread of its own.

    The thread reads the live parameters and moments, so whoever changes them (the optimizer) has
    to `wait` first; forward and backward do not.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tokenizer: Tokenizer | None,
        manifest: dict,
        keep_last: int = 0,
        keep_every: int | None = None,
    ) -> None:
        self.folder = folder
        self._fixed = {
            "tokenizer": tokenizer,
            "manifest": manifest,
            "keep_last": keep_last,
            "keep_every": keep_every,
        }
        self._thread: threading.Thread | None = None
        self._saved: Saved | BaseException | None = None

    def start(self, state: TrainingState, model: Model, optimizer: torch.optim.Optimizer) -> None:
        """Begin to write the checkpoint of `state`; the one before must have been waited for."""
        assert self._thread is None, "a checkpoint is being written"
        work = (copy.deepcopy(state), model, optimizer, _stream_after(model.head_weight.device))
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

    def _write(
        self,
        state: TrainingState,
        model: Model,
        optimizer: torch.optim.Optimizer,
        stream: torch.cuda.Stream | None,
    ) -> None:
        started, path, error = time.monotonic(), None, None
        try:
            with torch.cuda.stream(stream):
                path = save_checkpoint(self.folder, state, model, optimizer, **self._fixed)
        except OSError as problem:
            error = problem
        except BaseException as defect:  # `wait` raises it, where it is seen
            self._saved = defect
            return
        self._saved = Saved(state.step, path, error, time.monotonic() - started)


def _stream_after(device: torch.device) -> torch.cuda.Stream | None:
    """Return a stream for copies of what is queued now, beside what will be queued then."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream
