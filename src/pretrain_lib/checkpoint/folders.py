"""Checkpoint folders: names, hashes, verification, pruning, the newest intact one."""

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
    """Return the path of a step's checkpoint in `folder`, a run's `checkpoints` folder."""
    return folder / f"step-{step:08d}"


def staging_path(folder: Path, step: int) -> Path:
    """Return the path at which a step's checkpoint is written before it is committed."""
    return folder / f".{checkpoint_path(folder, step).name}.tmp"


def find_newest(folder: Path) -> Path | None:
    """Return the newest intact checkpoint, skipping damaged ones with a warning."""
    for path in reversed(_by_age(folder)):
        if not (problems := verify_checkpoint(path)):
            return path
        warnings.warn(f"skipping a damaged checkpoint: {'; '.join(problems)}", stacklevel=2)
    return None


def verify_checkpoint(path: Path) -> list[str]:
    """Verify the hashes of a checkpoint; return one line per problem, none if it is intact."""
    if not (path / FILES).is_file():
        return [f"{path / FILES}: missing"]
    try:
        expected = json.loads((path / FILES).read_text())
    except ValueError:
        return [f"{path / FILES}: not readable"]
    found = describe_files(path)
    problems = [f"{path / name}: missing" for name in expected.keys() - found.keys()]
    added = {name for name in found.keys() - expected.keys() if not _is_hidden(name)}
    problems += [f"{path / name}: not part of the checkpoint" for name in added]
    problems += [
        f"{path / name}: its bytes differ from its hash"
        for name in expected.keys() & found.keys()
        if expected[name] != found[name]
    ]
    return sorted(problems)


def commit_staged(staging: Path, target: Path) -> None:
    """Commit a complete checkpoint: fsync, then atomic rename to its final name."""
    flush_to_disk(staging)
    if target.exists():  # a damaged checkpoint, or one from before a rollback
        target.rename(target.with_name(f".{target.name}.old"))
    staging.rename(target)
    flush_to_disk(target.parent, recursive=False)


def remove_leftovers(folder: Path) -> None:
    """Remove the files of interrupted saves and of replaced or pruned checkpoints.

    A file that cannot be removed, such as one in use on a network file system, is removed the next
    time.
    """
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def prune(folder: Path, newest: Path, *, keep_last: int, keep_every: int | None) -> None:
    """Retire the checkpoints that `newest`, just committed, makes obsolete.

    Keeps the `keep_last` newest (0: all) and every checkpoint whose step is a multiple of
    `keep_every`. Checkpoints of later steps are obsolete too: they precede a rollback.
    """
    obsolete = [path for path in _by_age(folder) if path.name > newest.name]
    if keep_last:
        earlier = [path for path in _by_age(folder) if path.name < newest.name]
        too_old = earlier[: max(0, len(earlier) + 1 - keep_last)]
        obsolete += [p for p in too_old if not (keep_every and _step_of(p) % keep_every == 0)]
    for path in obsolete:
        try:
            # Rename before deleting, so that a half-deleted one is not taken for a checkpoint.
            path.rename(folder / f".{path.name}.old")
        except OSError as error:  # does not affect the new checkpoint
            warnings.warn(f"cannot remove an obsolete checkpoint: {error}", stacklevel=2)


def _is_hidden(name: str) -> bool:
    """Return whether a file is hidden, such as those that desktops leave behind (.DS_Store)."""
    return Path(name).name.startswith(".")


def _by_age(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if NAME.fullmatch(path.name))


def _step_of(path: Path) -> int:
    return int(NAME.fullmatch(path.name)[1])


def describe_files(path: Path, digests: dict[str, str] | None = None) -> dict[str, dict]:
    """Return the size and xxh3_128 of every file of a checkpoint, except the file list itself.

    Files with a hash in `digests` are not read.
    """
    described = {}
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        name = file.relative_to(path).as_posix()
        if name != FILES:
            digest = (digests or {}).get(name) or hash_file(file)
            described[name] = {"bytes": file.stat().st_size, "xxh3_128": digest}
    return described


def flush_to_disk(folder: Path, *, recursive: bool = True) -> None:
    """Fsync a folder, and with `recursive` all files and folders below it."""
    for path in [*(folder.rglob("*") if recursive else ()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
