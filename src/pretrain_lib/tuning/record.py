"""Results of the trials of a search: their losses and speed, and the file that records them."""

import math
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from pretrain_lib.checkpoint.folders import NAME as CHECKPOINT_NAME
from pretrain_lib.config.renamed import with_new_names
from pretrain_lib.config.units import show_duration
from pretrain_lib.files.locks import PAUSE_SECONDS, is_locked
from pretrain_lib.files.reading import read_object
from pretrain_lib.files.writes import write_json
from pretrain_lib.run_folder.folder import (
    CHECKPOINTS,
    METRICS,
    describe_changes,
    read_status,
    setting_changes,
    unsafe_changes,
)
from pretrain_lib.run_folder.rows import read_metrics, read_rows
from pretrain_lib.tuning.proxy import flag_values
from pretrain_lib.tuning.search import Trial

RUNS = "runs"  # in the folder of a search: the run folders, and beside each what it printed
PLAN = "plan.json"
RESULT = "result.json"
MEASURED_STEPS = 8  # from which a speed is taken, the first one left out
# A run that is resumed may change these, but runs are compared by their loss on this text.
COMPARED_ON = (
    "validation.",
    "data.source",
    "data.path",
    "data.text_field",
    "data.document_separator",
    "data.validation",
    "data.tokenizer",
    "data.train_tokenizer",
)
DIVERGED = "FloatingPointError"  # the reason of a run that stopped after updates left out


def run_folder(out: Path, trial: Trial) -> Path:
    """Return the run folder of a trial, which its name describes."""
    return out / RUNS / "_".join([f"{trial.tokens}", *(f"{rate:g}" for rate in trial.rates)])


def await_run(folder: Path) -> None:
    """Wait for a run that a search which was killed has left behind, until it ends."""
    while is_locked(folder):
        time.sleep(PAUSE_SECONDS)


def read_loss(folder: Path) -> float | None:
    """Return the last validation loss of a finished run, infinity if it diverged.

    None for a run that is not finished.
    """
    status = read_status(folder)
    if status.get("state") == "failed" and status.get("reason", "").startswith(DIVERGED):
        return math.inf
    if status.get("state") != "done":
        return None
    losses = [row["loss"] for row in read_rows(folder / METRICS) if row["kind"] == "validation"]
    assert losses, f"{folder}: a run without a validation"
    return math.inf if losses[-1] is None else losses[-1]


def drop_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a finished run: only its metrics are of use."""
    for path in (folder / CHECKPOINTS).glob("step-*"):
        if CHECKPOINT_NAME.fullmatch(path.name):
            shutil.rmtree(path)


def read_plan(out: Path, asked: dict) -> dict:
    """Return the plan that lies in a folder, or `asked` if there is none.

    Raises ValueError if another search was begun there.
    """
    path = out / PLAN
    before = read_object(path) if path.is_file() else {}
    old, new = (_as_written(plan) for plan in (asked | before, asked))
    other = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if other:
        earlier = ", ".join(
            f"{name} {old[name]}" if name in old else f"no {name}" for name in other
        )
        now = ", ".join(new.get(name, f"no {name}") for name in other)
        raise ValueError(
            f"out={out} holds a search with {earlier}, not {now}: give the same command to go on "
            f"with it, or another folder"
        )
    if "settings" in before:  # not in a plan of an earlier version
        _check_settings(out, before["settings"], asked["settings"])
    return asked | before


def _check_settings(out: Path, before: dict, now: dict) -> None:
    """Raise ValueError if settings that decide the losses of a search have changed.

    The same flags give others when an overlay or the recipe was edited.
    """
    changes = setting_changes(with_new_names(before, now=now), now)
    judged = {name: pair for name, pair in changes.items() if name.startswith(COMPARED_ON)}
    if decisive := unsafe_changes(changes, allowed=[]) | judged:
        text = "; ".join(describe_changes(decisive))
        raise ValueError(
            f"the search in {out} was begun with other settings ({text}); set them back, or give "
            f"another --out"
        )


def _as_written(plan: dict) -> dict[str, str]:
    """Return what a plan was asked with, by the name of the argument and as a user writes it."""
    return {
        "RECIPE": plan["recipe"],
        **flag_values(plan["flags"]),
        "--width": str(plan["width"]),
        "--budget": show_duration(plan["budget"]),
    }


def write_result(out: Path, names: tuple[str, ...], losses: dict[Trial, float], **found) -> None:
    """Write all trials and what was found to `RESULT`; a diverged run has the loss null."""
    trials: Iterable[dict] = (
        asdict(trial) | {"loss": loss if math.isfinite(loss) else None}
        for trial, loss in losses.items()
    )
    write_json(out / RESULT, {"rates": list(names), **found, "trials": list(trials)})


@dataclass(frozen=True)
class Measured:
    """What a few steps of a run have shown."""

    tokens_per_second: float
    """The median of all steps but the first."""
    seconds: float
    """Of all steps."""
    validated: int
    """Tokens that each validation reads, 0 without any."""


def read_measured(folder: Path) -> Measured:
    """Return what the rows of a run with at least two steps show."""
    rows = list(read_metrics(folder))
    steps = [row for row in rows if row["kind"] == "train"]
    validated = [row["targets"] for row in rows if row["kind"] == "validation"]
    speed = median(row["tokens_per_second"] for row in steps[1:])
    return Measured(speed, steps[-1]["seconds"], max(validated, default=0))
