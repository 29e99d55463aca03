"""Checkpoints as folders: their names, what is in them by hash, which is the newest whole one."""

import json
import os
import re
import shutil
import warnings
from pathlib import Path

from pretrain_lib.tensors.files import hash_file

TRAINING = "training"  # inside a checkpoint: what a resume needs beyond the model
STATE, MANIFEST, FILES = (
    f"{TRAINING}/{name}" for name in ("state.json", "manifest.json", "files.json")
)
NAME = re.compile(r"step-(\d{8})")


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies in a run's `checkpoints` folder."""
    return folder / f"step-{step:08d}"


def staging_path(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies until it is whole."""
    return folder / f".{checkpoint_path(folder, step).name}.tmp"


def find_newest(folder: Path) -> Path | None:
    """Return the newest whole checkpoint, passing over broken ones with a warning."""
    for path in reversed(_by_age(folder)):
        if not (problems := verify_checkpoint(path)):
            return path
        warnings.warn(f"passing over a broken checkpoint: {'; '.join(problems)}", stacklevel=2)
    return None


def verify_checkpoint(path: Path) -> list[str]:
    """Return what is wrong with a checkpoint, one line a file; nothing if it is whole."""
    if not (path / FILES).is_file():
        return [f"{path / FILES}: missing"]
    try:
        expected = json.loads((path / FILES).read_text())
    except ValueError:
        return [f"{path / FILES}: not readable"]
    found = describe_files(path)
    problems = [f"{path / name}: missing" for name in expected.keys() - found.keys()]
    added = {name for name in found.keys() - expected.keys() if not _is_hidden(name)}
    problems += [f"{path / name}: not part of it" for name in added]
    problems += [
        f"{path / name}: its bytes differ from its hash"
        for name in expected.keys() & found.keys()
        if expected[name] != found[name]
    ]
    return sorted(problems)


def commit_staged(staging: Path, target: Path) -> None:
    """Give a whole checkpoint its name, once all of it is on the disk."""
    flush_to_disk(staging)
    if target.exists():  # a broken one, or of a past that the run has turned back from
        target.rename(target.with_name(f".{target.name}.old"))
    staging.rename(target)
    flush_to_disk(target.parent, recursive=False)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed save has left, and what a finished one has replaced.

    What cannot be removed, because it is being read over a network file system, goes the next time.
    """
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def prune(folder: Path, newest: Path, *, keep_last: int, keep_every: int | None) -> None:
    """Remove what the checkpoint just committed makes obsolete, never that one.

    Later steps are of a past that the run has turned back from.
    """
    obsolete = [path for path in _by_age(folder) if path.name > newest.name]
    if keep_last:
        earlier = [path for path in _by_age(folder) if path.name < newest.name]
        too_old = earlier[: max(0, len(earlier) + 1 - keep_last)]
        obsolete += [p for p in too_old if not (keep_every and _step_of(p) % keep_every == 0)]
    for path in obsolete:
        try:
            path.rename(folder / f".{path.name}.old")  # half of one must not be found by its name
        except OSError as error:  # the new one is whole all the same
            warnings.warn(f"an obsolete checkpoint stays: {error}", stacklevel=2)


def _is_hidden(name: str) -> bool:
    """Whether a file is one of those that a desktop leaves in folders (.DS_Store)."""
    return Path(name).name.startswith(".")


def _by_age(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if NAME.fullmatch(path.name))


def _step_of(path: Path) -> int:
    return int(NAME.fullmatch(path.name)[1])


def describe_files(path: Path, digests: dict[str, str] | None = None) -> dict[str, dict]:
    """Return size and xxh3_128 of every file of a checkpoint but the list of them.

    Those in `digests` are not read again.
    """
    described = {}
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        name = file.relative_to(path).as_posix()
        if name != FILES:
            digest = (digests or {}).get(name) or hash_file(file)
            described[name] = {"bytes": file.stat().st_size, "xxh3_128": digest}
    return described


def flush_to_disk(folder: Path, *, recursive: bool = True) -> None:
    """Flush a folder's entries, and with `recursive` the files and folders in it."""
    for path in [*(folder.rglob("*") if recursive else ()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
