"""Checkpoints: Hugging Face model folders with what a resume needs inside. Floor 5.

A checkpoint is written under a temporary name, hashed and flushed to disk, then renamed, and older
ones are pruned after that: at every instant the newest whole one is whole. Nothing is pickled.
"""

import errno
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from pretrain_lib.checkpoint_files import (
    FILES,
    MANIFEST,
    OPTIMIZER,
    STATE,
    TRAINING,
    checkpoint_path,
    describe_files,
    flush_to_disk,
    prune,
    remove_leftovers,
    staging_path,
)
from pretrain_lib.data.order import ORDER_VERSION
from pretrain_lib.data.shards import write_json
from pretrain_lib.data.tokenizer import Tokenizer
from pretrain_lib.models.hf import Model, load_weights, save_pretrained
from pretrain_lib.optim import moment_dtype
from pretrain_lib.tensor_files import write_tensors

STATE_VERSION = 1
SPARE_BYTES = 2**24  # for all but the tensors


@dataclass
class TrainingState:
    """Where a run stands, after whole optimizer steps."""

    step: int = 0
    windows: int = 0
    """Windows consumed: the position in the data."""
    tokens: int = 0
    """Tokens trained on."""
    seconds: float = 0.0
    """Time spent training, in all sessions."""
    skipped: int = 0
    """Updates left out, because the gradient was not finite or for a spike."""
    skipped_in_a_row: int = 0
    best_loss: float | None = None
    """The lowest validation loss so far, in nats per target token."""
    best_step: int = 0
    recent: list[list[float]] = field(default_factory=list)
    """Loss and gradient norm of the last steps, by which a spike is told."""
    rollbacks: list[dict] = field(default_factory=list)
    """Where the run turned back, and which windows it left out."""
    row_loss: float = 0.0
    """Nats since the last row of metrics, over all targets since."""
    row_targets: int = 0
    row_tokens: int = 0
    row_seconds: float = 0.0
    stream: dict | None = None
    """Where in its source a stream's present segment begins."""
    order_version: int = ORDER_VERSION
    state_version: int = STATE_VERSION

    def count_step(self, *, windows: int, tokens: int, seconds: float) -> None:
        """Move on by one optimizer step."""
        self.step += 1
        self.windows += windows
        self.tokens += tokens
        self.row_tokens += tokens
        self.seconds += seconds
        self.row_seconds += seconds

    def begin_row(self) -> None:
        """Begin to gather the next row of metrics."""
        self.row_loss, self.row_targets, self.row_tokens, self.row_seconds = 0.0, 0, 0, 0.0


def save_checkpoint(
    folder: Path,
    state: TrainingState,
    model: Model,
    optimizer: torch.optim.Optimizer,
    *,
    tokenizer: Tokenizer | None,
    manifest: dict,
    keep_last: int = 0,
    keep_every: int | None = None,
) -> Path:
    """Write the checkpoint of `state.step` into `folder`, commit it, prune what is obsolete.

    Kept are the `keep_last` newest (0: all) and those of every `keep_every`-th step. To be called
    on one process. Returns the checkpoint's path; raises OSError, leaving the others as they are,
    if it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    _check_free_space(folder, checkpoint_bytes(model, optimizer))
    staging, target = staging_path(folder, state.step), checkpoint_path(folder, state.step)
    try:
        (staging / TRAINING).mkdir(parents=True)
        digests = save_pretrained(model, staging, tokenizer=tokenizer)
        digests[OPTIMIZER] = write_tensors(staging / OPTIMIZER, optimizer_tensors(model, optimizer))
        write_json(staging / STATE, asdict(state))
        write_json(staging / MANIFEST, manifest)
        write_json(staging / FILES, describe_files(staging, digests))
        flush_to_disk(staging)
    except OSError:
        remove_leftovers(folder)  # or a disk that is full would stay so
        raise
    if target.exists():  # a broken one, or of a past that the run has turned back from
        target.rename(folder / f".{target.name}.old")
    staging.rename(target)
    flush_to_disk(folder, recursive=False)
    prune(folder, target, keep_last=keep_last, keep_every=keep_every)
    remove_leftovers(folder)
    return target


def checkpoint_bytes(model: Model, optimizer: torch.optim.Optimizer) -> int:
    """Return how much room on the disk a checkpoint takes: fp32 weights and both Adam moments."""
    each = 4 + 2 * moment_dtype(optimizer).itemsize
    return each * sum(parameter.numel() for parameter in model.parameters()) + SPARE_BYTES


def _check_free_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"a checkpoint takes {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free: make "
            f"room, or keep fewer (run.keep_last)",
            str(folder),
        )


def read_state(path: Path) -> tuple[TrainingState, dict]:
    """Return the state and the manifest of a checkpoint."""
    if not (path / STATE).is_file():
        raise ValueError(f"run.resume={path} is not a checkpoint: it has no {STATE}")
    values = json.loads((path / STATE).read_text())
    if values.get("state_version") != STATE_VERSION:
        raise ValueError(
            f"{path}: state_version={values.get('state_version')} is not the {STATE_VERSION} that "
            f"this version reads"
        )
    return TrainingState(**values), json.loads((path / MANIFEST).read_text())


def load_checkpoint(path: Path, model: Model, optimizer: torch.optim.Optimizer) -> None:
    """Fill model and optimizer from a checkpoint."""
    load_weights(model, path)
    tensors = load_file(path / OPTIMIZER)
    for name, parameter in model.named_parameters():
        kinds = {key.rsplit(".", 1)[1] for key in tensors if key.startswith(f"{name}.")}
        state = {kind: tensors.pop(f"{name}.{kind}") for kind in kinds}
        if any(t.shape not in (parameter.shape, torch.Size()) for t in state.values()):
            raise ValueError(f"{path}: the optimizer's state of {name} does not fit the model")
        dtype = moment_dtype(optimizer)
        optimizer.state[parameter] = {
            k: t.to(parameter.device, dtype if t.dim() else None) for k, t in state.items()
        }
    if tensors:
        raise ValueError(f"{path}: the optimizer's {sorted(tensors)[:3]}... belong to no parameter")


def optimizer_tensors(model: Model, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the optimizer's state as tensors named after the parameters."""
    return {
        f"{name}.{kind}": tensor.detach()
        for name, parameter in model.named_parameters()
        for kind, tensor in sorted(optimizer.state.get(parameter, {}).items())
    }
