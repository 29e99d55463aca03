"""Save and load checkpoints: Hugging Face model folders with a training state inside.

A checkpoint is written under a temporary name, hashed, flushed to disk and renamed atomically;
older ones are pruned only then, so an intact one exists at every instant. Nothing is pickled.
"""

import errno
import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pretrain_lib.checkpoint.contents import plain_values
from pretrain_lib.checkpoint.folders import (
    FILES,
    MANIFEST,
    STATE,
    TRAINING,
    check_free_space,
    check_kept,
    checkpoint_path,
    commit_staged,
    describe_files,
    prune,
    remove_leftovers,
    staging_path,
)
from pretrain_lib.checkpoint.parts import Part, collect_part, load_moments, on_writers, write_part
from pretrain_lib.data.permutation import ORDER_VERSION
from pretrain_lib.data.text.tokenizer import Tokenizer
from pretrain_lib.files.writes import write_json
from pretrain_lib.measures import VALIDATION_LOSS
from pretrain_lib.models.any_model import check_tokenizer, load_weights, write_configuration
from pretrain_lib.models.interface import Model, unwrap
from pretrain_lib.optim.state import check_holds

STATE_VERSION = 2


@dataclass
class TrainingState:
    """The progress of a run after a whole number of optimizer steps."""

    step: int = 0
    windows: int = 0
    """Windows consumed: the position in the data."""
    tokens: int = 0
    """Tokens trained on."""
    seconds: float = 0.0
    """Training time over all sessions."""
    skipped: int = 0
    """Updates skipped because of a non-finite gradient or a spike."""
    skipped_in_a_row: int = 0
    best_loss: float | None = None
    """The lowest validation loss so far, in nats per target token."""
    best_step: int = 0
    validated: str | None = None
    """Identifies the windows that `best_loss` was measured on; None if unknown."""
    best_scores: dict[str, list] = field(default_factory=dict)
    """The best value so far of the score that `checkpoint.keep_best` names, and its step."""
    recent: list[list[float]] = field(default_factory=list)
    """Loss and gradient norm of the last steps, for spike detection."""
    rollbacks: list[dict] = field(default_factory=list)
    """The steps that the run rolled back to, and the windows it skipped."""
    turn_back_to: int = 0  # the step of the newest checkpoint that is none of a stop
    row_loss: float = 0.0
    """Loss in nats, summed over the targets since the last metrics row."""
    row_targets: int = 0
    row_tokens: int = 0
    row_seconds: float = 0.0
    stream: dict | None = None
    """With streaming, where in the source the current segment begins."""
    order_version: int = ORDER_VERSION
    evaluated: bool = False
    """Whether what is due after this step, such as a validation, has been done."""
    state_version: int = STATE_VERSION

    def count_step(self, *, windows: int, tokens: int, seconds: float) -> None:
        """Advance by one optimizer step."""
        self.step += 1
        self.windows += windows
        self.tokens += tokens
        self.row_tokens += tokens
        self.seconds += seconds
        self.row_seconds += seconds
        self.evaluated = False

    def step_of_best(self, kept: str | None) -> int | None:
        """Return the step at which the validation loss, or the score `kept`, was best so far."""
        if kept is None:
            return None
        is_loss = kept == VALIDATION_LOSS
        return self.best_step if is_loss else self.best_scores.get(kept, (0, 0))[1]

    def begin_row(self) -> None:
        """Reset the totals of the metrics row."""
        self.row_loss, self.row_targets, self.row_tokens, self.row_seconds = 0.0, 0, 0, 0.0


def save_checkpoint(
    folder: Path | str,
    state: TrainingState,
    model: Model,
    optimizer: torch.optim.Optimizer,
    **options: Any,
) -> Path:
    """Write the checkpoint of `state.step` into `folder`, commit it, and prune obsolete ones.

    Must be called on all processes; those that have nothing to write return at once. `options` are
    the keyword arguments of `write_checkpoint`. Returns the path of the checkpoint. Raises OSError
    if it cannot be written; the other checkpoints are then left as they were.
    """
    if (part := collect_part(model, optimizer)) is not None:
        write_checkpoint(Path(folder), state, part, **options)
    return checkpoint_path(Path(folder), state.step)


def write_checkpoint(
    folder: Path,
    state: TrainingState,
    part: Part,
    *,
    tokenizer: Tokenizer | None,
    manifest: dict,
    keep_last: int = 0,
    keep_every: int | None = None,
    keep_best: str | None = None,
) -> Path:
    """Write this process's part of a checkpoint; the first process commits it once all have.

    Keeps the `keep_last` newest checkpoints (0: all), those of every `keep_every`-th step, and with
    `keep_best` that at which the loss or score of this name was best.
    """
    check_tokenizer(tokenizer)
    check_kept(keep_last=keep_last, keep_every=keep_every, keep_best=keep_best)
    values = plain_values(state, manifest=manifest)
    staging, target = staging_path(folder, state.step), checkpoint_path(folder, state.step)

    def commit() -> None:
        write_configuration(part.config, staging, tokenizer=tokenizer)
        write_json(staging / STATE, values)
        write_json(staging / MANIFEST, manifest)
        digests = {name: digest for each in written for name, digest in each.items()}
        described = describe_files(staging, digests)
        if missing := digests.keys() - described.keys():
            name = min(missing)
            raise OSError(errno.EIO, "written by another process but not visible to this one", name)
        write_json(staging / FILES, described)
        commit_staged(staging, target)

    try:
        begin = partial(_begin, folder, staging, needed=part.checkpoint_bytes)
        on_writers(part, begin, first_only=True)
        written = on_writers(part, lambda: write_part(part, staging))
        on_writers(part, commit, first_only=True)
    except OSError:
        if part.holder.index == 0:
            remove_leftovers(folder)  # otherwise a full disk would stay full
        raise
    if part.holder.index == 0:
        steps = {state.step_of_best(keep_best), state.turn_back_to}
        prune(folder, target, keep_last=keep_last, keep_every=keep_every, steps=steps)
        remove_leftovers(folder)
    return target


def _begin(folder: Path, staging: Path, *, needed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    check_free_space(folder, needed)
    (staging / TRAINING).mkdir(parents=True)


def read_state(path: Path | str) -> tuple[TrainingState, dict]:
    """Return the training state and the manifest of a checkpoint."""
    path = Path(path)
    if not (path / STATE).is_file():
        raise ValueError(f"run.resume={path} is not a checkpoint: it has no {STATE}")
    values = json.loads((path / STATE).read_text(encoding="utf-8"))
    if values.get("state_version") != STATE_VERSION:
        raise ValueError(
            f"{path}: state_version={values.get('state_version')} is not supported, this version "
            f"reads {STATE_VERSION}; resume with the version that wrote the checkpoint"
        )
    values = {"evaluated": True} | values  # old ones were saved after it
    return TrainingState(**values), json.loads((path / MANIFEST).read_text(encoding="utf-8"))


def load_checkpoint(path: Path | str, model: Model, optimizer: torch.optim.Optimizer) -> None:
    """Load model and optimizer from a checkpoint, written by any number of processes.

    Each process reads only the shards that it holds. Raises ValueError before anything is loaded if
    the optimizer was not built from the model.
    """
    model = unwrap(model)
    check_holds(model, optimizer)
    load_weights(model, Path(path))
    load_moments(Path(path), model, optimizer)
