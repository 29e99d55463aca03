"""Where a run begins: at the start, at its newest checkpoint, or at another run's. Floor 4."""

from dataclasses import dataclass
from pathlib import Path

import torch

from pretrain_lib.checkpoint import (
    TrainingState,
    find_newest,
    load_checkpoint,
    read_state,
    verify_checkpoint,
)
from pretrain_lib.config import Recipe
from pretrain_lib.data.order import ORDER_VERSION
from pretrain_lib.models.hf import Model
from pretrain_lib.run_folder import CHECKPOINTS, setting_changes, unsafe_changes


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    state: TrainingState
    continues: bool = False
    """Whether the state is this run's own, so that what was due at its step was done."""
    parent: str | None = None
    """The checkpoint of another run that this one, or the run it continues, was forked from."""
    changes: tuple[str, ...] = ()
    """Settings that differ from the checkpoint's, a line each."""


def resume(
    config: Recipe, model: Model, optimizer: torch.optim.Optimizer, *, fingerprint: str
) -> Start:
    """Load what `run.resume` means into model and optimizer.

    A run continues only with the settings that it was saved with, those apart that do not change
    what it computes. A fork, from a checkpoint of another folder, may change all but the model.
    """
    path, fork = _choose(config)
    if path is None:
        return Start(TrainingState(order_version=ORDER_VERSION))
    state, manifest = read_state(path)
    if state.order_version != ORDER_VERSION:
        raise ValueError(
            f"{path}: order_version={state.order_version}; this version of pretrain_lib reads the "
            f"data in order {ORDER_VERSION}"
        )
    changes = setting_changes(manifest["config"], config.to_dict())
    same_data = manifest["data_fingerprint"] == fingerprint
    if not same_data:
        changes["data"] = (manifest["data_fingerprint"][:12], fingerprint[:12])
    refused = unsafe_changes(changes, allowed=config.run.allow_changes)
    if fork:
        refused = {name: pair for name, pair in refused.items() if name.startswith("model.")}
    if refused:
        text = "; ".join(f"{name} was {old}, is {new}" for name, (old, new) in refused.items())
        raise ValueError(
            f"{path} was made with other settings ({text}): set them back, name them in "
            f"run.allow_changes, or start another run.dir from it with run.resume={path}"
        )
    load_checkpoint(path, model, optimizer)
    if not same_data:
        state.windows = 0
    return Start(
        state=state,
        continues=not fork,
        parent=str(path) if fork else manifest["parent"],
        changes=tuple(f"{n} was {old}, is {new}" for n, (old, new) in sorted(changes.items())),
    )


def _choose(config: Recipe) -> tuple[Path | None, bool]:
    """Return the checkpoint to load, if any, and whether it makes this run a fork."""
    own = Path(config.run.dir) / CHECKPOINTS
    if config.run.resume == "never":
        return None, False
    if (newest := find_newest(own)) is not None or config.run.resume == "auto":
        return newest, False
    path = Path(config.run.resume)
    if problems := verify_checkpoint(path):
        raise ValueError(f"run.resume={path} is not a whole checkpoint: {'; '.join(problems)}")
    return path, path.resolve().parent != own.resolve()
