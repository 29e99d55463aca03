"""Resume: start a run anew, or load a checkpoint of its own or of another run."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from pretrain_lib.checkpoint.folders import checkpoint_path, prune, remove_leftovers, still_there
from pretrain_lib.checkpoint.state import TrainingState, load_checkpoint, read_state
from pretrain_lib.config.renamed import with_new_names
from pretrain_lib.config.rules import DATA
from pretrain_lib.config.settings import Recipe
from pretrain_lib.data.permutation import ORDER_VERSION
from pretrain_lib.data.tokens.foreign import names_tokens
from pretrain_lib.distributed.launched import on_all, on_main
from pretrain_lib.models.any_model import load_weights
from pretrain_lib.models.interface import Model
from pretrain_lib.run_folder.folder import (
    CHECKPOINTS,
    describe_changes,
    setting_changes,
    unsafe_changes,
)
from pretrain_lib.training.checkpoint_choice import CHOICES, choose_checkpoint

# What is told of a launch when it changes; the manifest has all of it.
WORLD = ("processes", "device", "device_name", "precision", "threads", "system")
STEP_SIZES = {f"batch.{name}" for name in ("tokens", "ramp_from", "ramp_increment", "ramp_tokens")}
LENGTH, SHARES = "schedule.tokens", ("schedule.warmup_tokens", "schedule.decay_tokens")
WINDOW = "batch.sequence_length"

# What a validation loss depends on, besides the model and a path in data.validation. A rule there
# is that of the prepared folder, of which `DATA` is the fingerprint.
OF_VALIDATION = {DATA, "data.document_masking", "validation.tokens", WINDOW}


@dataclass(frozen=True)
class Start:
    """The starting point of a run."""

    state: TrainingState
    continues: bool = False
    """Whether the state is this run's own: evaluation and saving at its step are already done."""
    parent: str | None = None
    """The checkpoint of another run that this one, or the run it continues, was forked from."""
    changes: tuple[str, ...] = ()
    """One line for each setting that differs from the checkpoint's."""
    run_id: str = ""
    """Identifies the run in trackers; a fork gets a new one."""

    @property
    def is_new(self) -> bool:
        """Whether no checkpoint was loaded."""
        return not (self.continues or self.parent)


def resume(
    config: Recipe,
    model: Model,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    *,
    manifest: dict,
) -> Start:
    """Load the checkpoint chosen by `run.resume`, if any, into model and optimizer.

    `manifest` describes the current launch. Raises ValueError if a setting that affects the results
    differs from the checkpoint's, unless `run.allow_changes` names it. A fork, which starts from a
    checkpoint in another run's folder, may change all but the model and, after step 0, its steps.
    """
    (path, fork), run_id = on_main(
        accelerator, lambda: (choose_checkpoint(config), secrets.token_hex(4))
    )
    if path is None:
        return Start(TrainingState(), run_id=run_id)

    def load() -> Start:
        parts = config, path, model, optimizer
        with still_there(path):
            return _load(*parts, fork=fork, run_id=run_id, manifest=manifest)

    return on_all(load)


def _load(
    config: Recipe,
    path: Path,
    model: Model,
    optimizer: torch.optim.Optimizer,
    *,
    fork: bool,
    run_id: str,
    manifest: dict,
) -> Start:
    state, before = _read_checkpoint(path)
    now = manifest["config"]
    changes = setting_changes(with_new_names(before["config"], now=now), now)
    fingerprint_differs, is_other = _compare_data(before, manifest)
    if is_other or (fingerprint_differs and not fork):
        changes[DATA] = tuple(m["data_fingerprint"][:12] for m in (before, manifest))
    if state.step:
        _refuse_other_steps(path, changes)
    refused = unsafe_changes(changes, allowed=_with_shares(config.run.allow_changes))
    refused = _of_model(refused) if fork else refused
    if refused:
        fits = not _of_model(refused) or _fits(model, path)
        raise _refusal(path, refused, fits=fits)
    _refuse_earlier_end(config, path, state.step, fork=fork)
    load_checkpoint(path, model, optimizer)
    state.stream = None if fingerprint_differs else state.stream
    _find_place_in_data(state, changes, is_other=is_other)
    _forget_other_bests(state, changes, fork=fork)
    state.evaluated = state.evaluated and not fork
    for key in ("versions", "git"):
        changes |= setting_changes({key: before[key]}, {key: manifest[key]})
    worlds = ({name: m["world"].get(name) for name in WORLD} for m in (before, manifest))
    changes |= setting_changes(*worlds)
    return Start(
        state=state,
        continues=not fork,
        parent=str(path) if fork else before["parent"],
        run_id=run_id if fork else before["run_id"],
        changes=tuple(describe_changes(changes)),
    )


def _read_checkpoint(path: Path) -> tuple[TrainingState, dict]:
    """Return the state and the manifest of a checkpoint, or raise ValueError if it is no run's."""
    if not path.is_dir():
        raise ValueError(
            f"{path} is not visible to every process: run.dir must be on a shared disk"
        )
    state, before = read_state(path)
    if "config" not in before:
        raise ValueError(
            f"{path} was saved by a loop of one's own, so that it is not known how it was trained; "
            f"begin a run with its weights, by run.initial_weights={path}"
        )
    if state.order_version != ORDER_VERSION:
        raise ValueError(
            f"{path}: order_version={state.order_version}; this version of pretrain_lib reads the "
            f"data in order {ORDER_VERSION}"
        )
    return state, before


def _compare_data(before: dict, now: dict) -> tuple[bool, bool]:
    """Return whether two manifests have other data, or cut them otherwise; and whether other."""
    differs = before["data_fingerprint"] != now["data_fingerprint"]
    return differs, differs and before.get("data_identity") != now["data_identity"]


def _with_shares(allowed: Sequence[str]) -> list[str]:
    """Return the settings that may change, with the lengths that are shares of one of them."""
    return [*allowed, *(SHARES if LENGTH in allowed else ())]


def _refuse_other_steps(path: Path, changes: dict[str, tuple]) -> None:
    """Raise ValueError for steps of another size: the schedule is a function of their number."""
    if sizes := {name: changes[name] for name in STEP_SIZES & changes.keys()}:
        raise ValueError(
            f"{'; '.join(describe_changes(sizes))}: the steps of a run, and of a fork, keep their "
            f"size, in which its schedule is counted; set it back, or begin another run with the "
            f"weights of this one (run.initial_weights={path})"
        )


def _refuse_earlier_end(config: Recipe, path: Path, step: int, *, fork: bool) -> None:
    """Raise ValueError if a run would end before its checkpoint, or a fork at it."""
    last = config.last_step()
    if step < last or (step == last and not fork):
        return
    which = f"schedule.tokens={config.schedule.tokens}"
    if last < config.whole_run():
        which = f"run.max_steps={config.run.max_steps}"
    remedy = "give more: they count from the start of the run that it came from"
    if not fork:
        remedy = "give as much as before or more, or go back by run.resume to an earlier checkpoint"
    raise ValueError(
        f"{which} ends the run at step {last:,}, and {path} is of step {step:,}: {remedy}"
    )


def _find_place_in_data(state: TrainingState, changes: dict[str, tuple], *, is_other: bool) -> None:
    """Begin anew with other data; with other windows be as many tokens into the data as before."""
    if is_other:
        state.windows = 0
    elif WINDOW in changes:
        old, new = changes[WINDOW]
        state.windows = state.windows * old // new


def _of_model(changes: dict[str, tuple]) -> dict[str, tuple]:
    return {name: pair for name, pair in changes.items() if name.startswith("model.")}


def _fits(model: Model, path: Path) -> bool:
    """Return whether the weights of a checkpoint have the shapes of a model, by loading them."""
    try:
        load_weights(model, path)
    except ValueError:
        return False
    return True


def _refusal(path: Path, refused: dict[str, tuple], *, fits: bool) -> ValueError:
    """Return the error for changed settings."""
    text = "; ".join(describe_changes(refused))
    remedy = "set them back, or name them in run.allow_changes"
    if not fits:
        remedy = (
            "its weights do not fit such a model, whose shape cannot change: set it back, or train "
            "the other model from the beginning in another run.dir, without run.resume"
        )
    elif not _of_model(refused):
        remedy = (
            f"set them back, name them in run.allow_changes, or start another run.dir from it with "
            f"run.resume={path}"
        )
    return ValueError(f"{path} was made with other settings ({text}): {remedy}")


def _forget_other_bests(state: TrainingState, changes: dict, *, fork: bool) -> None:
    """Forget the best loss and score if they are those of another run, text or choice of items.

    What a loss was measured on is compared at the next validation, unless the checkpoint is so old
    that it does not say.
    """
    other_path = any(map(names_tokens, changes.get("data.validation", ())))
    is_other = other_path or bool(changes.keys() & OF_VALIDATION)
    if fork or (state.validated is None and is_other):
        state.best_loss, state.best_step = None, 0
    if fork or "scores.limit" in changes:
        state.best_scores = {}
    state.turn_back_to = 0 if fork else state.turn_back_to


def drop_later_checkpoints(config: Recipe, start: Start) -> None:
    """Drop the checkpoints of steps taken anew, where `run.resume` goes back within a run."""
    folder = Path(config.run.dir) / CHECKPOINTS
    if start.continues and config.run.resume not in CHOICES:
        newest = checkpoint_path(folder, start.state.step)
        prune(folder, newest, keep_last=0, keep_every=None)
        remove_leftovers(folder)
