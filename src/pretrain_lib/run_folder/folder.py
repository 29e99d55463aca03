"""The folder of a run: its lock, settings, manifest and status."""

import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator

from pretrain_lib.checkpoint.state import TrainingState
from pretrain_lib.config.settings import Recipe
from pretrain_lib.corpus.paths import Corpus
from pretrain_lib.distributed.launch_file import launch_configuration
from pretrain_lib.distributed.launched import is_restart
from pretrain_lib.files.locks import is_locked, lock_folder
from pretrain_lib.files.outputs import foreign_files
from pretrain_lib.files.reading import read_if_whole
from pretrain_lib.files.writes import make_folder, write_atomically, write_json
from pretrain_lib.run_folder.cut import drop_rows_after
from pretrain_lib.run_folder.layout import (
    CHECKPOINTS,
    MANIFEST,
    METRICS,
    RECIPE,
    SAMPLES,
    check_run_folder,
)
from pretrain_lib.run_folder.status import STATUS, read_status, write_status
from pretrain_lib.values import as_written

SCORES = "scores"  # lm-eval results, one file per evaluated step
PACKAGES = ("pretrain_lib", "torch", "accelerate", "transformers", "tokenizers", "safetensors")
# What Accelerate's names of precisions mean.
PRECISIONS = {
    "no": "fp32",
    "bf16": "bf16 autocast, fp32 weights",
    "fp8": "float8 products in the blocks, bf16 autocast, fp32 weights",
}
# Settings that may change on resume: they affect where and how a run executes, not its result.
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
    "data.remote_cache_gib",
    "data.workers",
    "data.max_rejected",
    "data.text_field",
    "data.document_separator",
    "data.validation",
    "data.tokenizer",
    "data.train_tokenizer",
)
IGNORED = "--exclude-standard"  # of git ls-files: by the rules of .gitignore
SHARED_SECONDS = 60  # how long a new file may take to appear on a network file system
# Exceptions to FREE_SETTINGS.
FIXED_SETTINGS = (
    "run.seed",
    "run.initial_weights",
    "system.fsdp_param_dtype",  # rounds the weights that are gathered
)


@contextmanager
def open_run_folder(folder: Path, *, resume: str) -> Iterator[None]:
    """Create a run folder and hold its lock.

    Raises ValueError if the folder is in use or not writable, or as `check_usable` does.
    """
    check_usable(folder, resume=resume)
    with lock_folder(folder, setting="run.dir"):
        (folder / CHECKPOINTS).mkdir(exist_ok=True)
        yield


def check_usable(folder: Path, *, resume: str) -> None:
    """Raise ValueError if a folder is no run's, or is not empty under `resume=never`."""
    if resume == "never" and not was_begun_here(folder) and _is_used(folder):
        raise ValueError(
            f"run.dir={folder} is not empty and run.resume=never; give another folder, or set "
            f"run.resume=auto to continue the run"
        )
    check_run_folder(folder)


def await_run_folder(folder: Path, *, run_id: str) -> None:
    """Wait for the manifest of this run, written by the main process.

    Raises ValueError if it does not appear within `SHARED_SECONDS`.
    """
    deadline = time.monotonic() + SHARED_SECONDS
    while read_if_whole(folder / MANIFEST).get("run_id") != run_id:
        if time.monotonic() > deadline:
            raise ValueError(
                f"run.dir={folder} is not visible to every process, and each reads checkpoints "
                f"there: give a folder on a file system that all of them share"
            )
        time.sleep(0.1)


def was_begun_here(folder: Path) -> bool:
    """Return whether this launch began the run in `folder` and has restarted its processes."""
    return is_restart(read_status(folder).get("launch"))


def _is_used(folder: Path) -> bool:
    """Return whether a folder holds more than the files left by a refused start."""
    if not folder.is_dir():
        return False
    entries = set(foreign_files(folder))
    checkpoints = folder / CHECKPOINTS
    if checkpoints.is_dir() and not any(checkpoints.iterdir()):
        entries.discard(CHECKPOINTS)
    if read_status(folder).get("state") == "refused":
        entries -= {STATUS, RECIPE}
    return bool(entries)


def begin_run(
    folder: Path,
    config: Recipe,
    manifest: dict,
    state: TrainingState,
    *,
    last_row: int,
) -> None:
    """Write `config.yaml`, `manifest.json` and the status; drop the rows after step `last_row`.

    `state` is that in which the run begins, or goes on. The manifest lists the starts of the run:
    this one, and those before it if it was resumed.
    """
    if not is_locked(folder):  # by this run, which has then looked at the folder
        check_run_folder(folder)
    make_folder(folder / CHECKPOINTS)
    _write_settings(folder / "config.yaml", config)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    start = {"step": state.step, "tokens": state.tokens, "seconds": state.seconds, "time": now}
    start["processes"] = manifest["world"]["processes"]
    starts = [*_earlier_starts(folder, manifest), start]
    write_json(folder / MANIFEST, manifest | {"starts": starts})
    # The step of its newest checkpoint: a fork has none of its own yet.
    write_status(folder, "running", step=state.step if last_row == state.step else 0)
    for rows in (METRICS, SAMPLES):
        drop_rows_after(folder / rows, last_row, evaluated=state.evaluated)


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """Write `recipe.yaml`: the settings before presets, overlays and flags changed them.

    The warm-up is in tokens there, as in `config.yaml`.
    """
    if recipe.schedule.tokens is not None:
        recipe = replace(recipe, schedule=recipe.schedule.in_tokens(0))
    _write_settings(folder / RECIPE, recipe)


def _write_settings(path: Path, settings: Recipe) -> None:
    write_atomically(path, yaml.safe_dump(settings.to_dict(), sort_keys=False).encode())


def _earlier_starts(folder: Path, manifest: dict) -> list[dict]:
    """Return the starts of the same run that the manifest in its folder lists."""
    before = read_if_whole(folder / MANIFEST)
    is_same = before.get("run_id") == manifest["run_id"]
    return before.get("starts", []) if is_same else []


def build_manifest(config: Recipe, corpus: Corpus, accelerator: Accelerator) -> dict:
    """Return everything that a run depends on: settings, data, versions, git revision, machine."""
    return {
        "config": config.to_dict(),
        "data_fingerprint": corpus.fingerprint,
        "data_identity": corpus.identity,
        # torch.__version__ includes the build (+cpu, +cu126), unlike the package metadata.
        "versions": {name: version(name) for name in PACKAGES}
        | {"torch": torch.__version__, "python": platform.python_version()},
        "git": _git_revision(_program()),
        "world": {
            "device": accelerator.device.type,
            "device_name": device_name(accelerator.device),
            "processes": accelerator.num_processes,
            "precision": accelerator.mixed_precision,
            "distributed": accelerator.distributed_type.value,
            "threads": torch.get_num_threads(),
            "system": platform.platform(),
            "configuration": launch_configuration(),
        },
        "parent": None,
    }


def device_name(device: torch.device) -> str | None:
    """Return the model name of a device, None if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")  # Linux
    if device.type != "cpu" or not cpus.is_file():
        return None
    match = re.search(
        r"^model name\s*: (.+)$", cpus.read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    return match[1] if match else None


def _program() -> Path | None:
    """Return the file of the recipe or script that runs, None in a session without one."""
    name = getattr(sys.modules["__main__"], "__file__", None)
    return None if name is None else Path(name).resolve()


def _git_revision(file: Path | None) -> dict | None:
    """Return the git revision of the repository that a file lies in, None if there is none.

    It says whether there are uncommitted changes. A file that the repository ignores, as one of an
    environment in it, is not its own. Without a file it is that of the working directory.
    """
    folder = Path.cwd() if file is None else file.parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=True, cwd=folder
        ).stdout.strip()

    try:
        if file is not None and git("ls-files", "--others", "--ignored", IGNORED, "--", file.name):
            return None
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def setting_changes(before: dict, now: dict, prefix: str = "") -> dict[str, tuple]:
    """Return the settings that differ, by dotted name: `(value before, value now)`."""
    changes = {}
    for key in before.keys() | now.keys():
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changes |= setting_changes(old, new, f"{prefix}{key}.")
        elif old != new:
            changes[prefix + key] = (old, new)
    return changes


def describe_changes(changes: dict[str, tuple]) -> list[str]:
    """Return a line for each change, by name, with the values as users write them."""
    return [
        f"{name} was {as_written(old)}, is {as_written(new)}"
        for name, (old, new) in sorted(changes.items())
    ]


def unsafe_changes(changes: dict[str, tuple], *, allowed: list[str]) -> dict[str, tuple]:
    """Return the changes that would make the resumed run a different run than the saved one."""
    return {
        name: values
        for name, values in changes.items()
        if name not in allowed and (name in FIXED_SETTINGS or not name.startswith(FREE_SETTINGS))
    }
