"""The folder of a run: locked while in use, with its settings, manifest and status."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator

from pretrain_lib.config.settings import Recipe
from pretrain_lib.data.tokens.shards import LOCK, lock_folder, write_atomically, write_json
from pretrain_lib.distributed.launch_file import launch_configuration
from pretrain_lib.distributed.launched import is_restart, launch_id
from pretrain_lib.run_folder.metrics import drop_rows_after

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
SCORES = "scores"  # lm-eval's own results, a file for each step that was scored
STATUS = "status.json"
PACKAGES = ("pretrain_lib", "torch", "accelerate", "transformers", "tokenizers", "safetensors")
# What may differ when a run is resumed: where and how it runs, never what it computes.
FREE_SETTINGS = (
    "run.",
    "log.",
    "checkpoint.",
    "validation.",
    "samples.",
    "scores.",
    "system.",
    "stability.max_skipped",
    "batch.micro_batch",
    "data.source",
    "data.path",
    "data.workers",
    "data.max_rejected",
    "data.text_field",
    "data.validation",
    "data.tokenizer",
    "data.train_tokenizer",
)
SHARED_SECONDS = 60  # within which a network file system shows a new file to all
FIXED_SETTINGS = (
    "run.seed",
    "run.initial_weights",
)


@contextmanager
def open_run_folder(folder: Path, *, resume: str) -> Iterator[None]:
    """Make and hold a run folder; raises ValueError if it is in use, unwritable or unwanted."""
    if resume == "never" and not was_begun_here(folder) and _is_used(folder):
        raise ValueError(
            f"run.dir={folder} is not empty and run.resume=never; give another folder, or "
            f"run.resume=auto to continue it"
        )
    with lock_folder(folder, setting="run.dir"):
        (folder / CHECKPOINTS).mkdir(exist_ok=True)
        yield


def await_run_folder(folder: Path) -> None:
    """Wait for what the main process has written; raises ValueError if it does not appear."""
    deadline = time.monotonic() + SHARED_SECONDS
    while not (folder / "manifest.json").is_file():
        if time.monotonic() > deadline:
            raise ValueError(
                f"run.dir={folder} is not seen by every process, and each writes its part of a "
                f"checkpoint: give a folder on a disk that all of them share"
            )
        time.sleep(0.1)


def was_begun_here(folder: Path) -> bool:
    """Whether the run in a folder was begun by this very launch, which has started it again."""
    return is_restart(read_status(folder).get("launch"))


def _is_used(folder: Path) -> bool:
    """Whether a folder holds more than a refused start leaves behind."""
    if not folder.is_dir():
        return False
    entries = {path.name for path in folder.iterdir()} - {LOCK}
    checkpoints = folder / CHECKPOINTS
    if checkpoints.is_dir() and not any(checkpoints.iterdir()):
        entries.discard(CHECKPOINTS)
    if read_status(folder).get("state") == "refused":
        entries.discard(STATUS)
    return bool(entries)


def begin_run(folder: Path, config: Recipe, manifest: dict, *, step: int, last_row: int) -> None:
    """Write `config.yaml`, `manifest.json` and the status; cut rows of steps after `last_row`."""
    (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(config.to_dict(), sort_keys=False)
    write_atomically(folder / "config.yaml", text.encode())
    write_json(folder / "manifest.json", manifest)
    write_status(folder, "running", step=step)
    for rows in (METRICS, SAMPLES):
        drop_rows_after(folder / rows, last_row)


def write_status(folder: Path, state: str, *, step: int | None = None, reason: str = "") -> None:
    """Write `status.json`: running, done, resumable, failed or refused."""
    assert state in ("running", "done", "resumable", "failed", "refused"), state
    launch = {} if launch_id() is None else {"launch": launch_id()}
    write_json(folder / STATUS, {"state": state, "step": step, "reason": reason} | launch)


def read_status(folder: Path) -> dict:
    """Return `status.json`, empty if there is none."""
    path = folder / STATUS
    return json.loads(path.read_text()) if path.is_file() else {}


def build_manifest(config: Recipe, fingerprint: str, accelerator: Accelerator) -> dict:
    """Return what a run depends on: settings, data, versions, revision, machine."""
    return {
        "config": config.to_dict(),
        "data_fingerprint": fingerprint,
        # torch's own says for which device it was built.
        "versions": {name: version(name) for name in PACKAGES}
        | {"torch": torch.__version__, "python": platform.python_version()},
        "git": _git_revision(),
        "world": {
            "device": accelerator.device.type,
            "processes": accelerator.num_processes,
            "precision": accelerator.mixed_precision,
            "distributed": accelerator.distributed_type.value,
            "threads": torch.get_num_threads(),
            "system": platform.platform(),
            "configuration": launch_configuration(),
        },
        "parent": None,
    }


def _git_revision() -> dict | None:
    """Return the revision of the checkout that the run was started in, and whether it was clean."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def setting_changes(before: dict, now: dict, prefix: str = "") -> dict[str, tuple]:
    """Return every setting that differs, by dotted name: `(value before, value now)`."""
    changes = {}
    for key in before.keys() | now.keys():
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changes |= setting_changes(old, new, f"{prefix}{key}.")
        elif old != new:
            changes[prefix + key] = (old, new)
    return changes


def unsafe_changes(changes: dict[str, tuple], *, allowed: list[str]) -> dict[str, tuple]:
    """Return the changes with which a resumed run would not be the run that was saved."""
    return {
        name: values
        for name, values in changes.items()
        if name not in allowed and (name in FIXED_SETTINGS or not name.startswith(FREE_SETTINGS))
    }


def is_main_rank() -> bool:
    """Whether this is the process that writes, known before the processes meet."""
    return int(os.environ.get("RANK", 0)) == 0
