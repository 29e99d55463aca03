"""Checkpoint folders: names, hashes, verification, pruning, the newest intact one."""

import errno
import json
import re
import shutil
import warnings
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pretrain_lib.files.reading import parse_json
from pretrain_lib.files.writes import flush, flush_to_disk
from pretrain_lib.measures import check_measure
from pretrain_lib.tensors.files import hash_file
from pretrain_lib.values import check_value

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


def find_newest(
    folder: Path | str, *, accept: Callable[[Path], bool] = lambda _: True
) -> Path | None:
    """Return the newest intact checkpoint that `accept` takes, None if there is none.

    Damaged and unreadable ones are skipped with a warning.
    """
    folder = Path(folder)
    for path in reversed(_by_age(folder)):
        if not (problems := verify_checkpoint(path)):
            if accept(path):
                return path
        elif path in _by_age(folder):
            warnings.warn(f"skipping a damaged checkpoint: {'; '.join(problems)}", stacklevel=2)
        else:  # its run has removed it meanwhile, and has others
            return find_newest(folder, accept=accept)
    return None


@contextmanager
def still_there(folder: Path) -> Iterator[None]:
    """Raise ValueError if a folder that is read meanwhile was removed or replaced.

    A run does so with its old checkpoints. What failed was not the fault of the files then, and
    what was read may be that of two checkpoints, or lack what the other readers found missing.
    """
    before, problem = _identify(folder), None
    try:
        yield
    except Exception as error:  # transformers raises many types
        problem = error
    if _identify(folder) != before:
        raise ValueError(
            f"{folder} was removed or replaced while it was read, as a run does with its old "
            f"checkpoints: start again, or give one that checkpoint.keep_every keeps"
        ) from problem
    if problem is not None:
        raise problem


def _identify(folder: Path) -> tuple[int, int] | None:
    """Return what only this folder has while it exists, whatever its path; None without one."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def verify_checkpoint(path: Path | str) -> list[str]:
    """Verify the files of a checkpoint; return one line per problem, none if it is intact.

    A file that cannot be read is a problem like any other. Files that the checkpoint's list does
    not name are not part of it and are ignored.
    """
    path = Path(path)
    try:
        expected = parse_json((path / FILES).read_bytes(), pairs=_without_repeats)
    except FileNotFoundError:
        return [f"{path / FILES}: missing"]
    except OSError as error:
        return [f"{path / FILES}: cannot be read ({error.strerror})"]
    except ValueError:
        return [f"{path / FILES}: not readable"]
    if not isinstance(expected, dict):
        return [f"{path / FILES}: not readable"]
    problems = {name: _problem(path, name, expected[name]) for name in sorted(expected)}
    return [f"{path / name}: {problem}" for name, problem in problems.items() if problem]


def listed_files(path: Path) -> list[str]:
    """Return the names of the files that a checkpoint consists of, in order."""
    return sorted(json.loads((path / FILES).read_bytes()))


def _without_repeats(pairs: list[tuple]) -> dict:
    """Return the dict of a JSON object; raises ValueError for a key that occurs twice."""
    if len(dict(pairs)) < len(pairs):  # a flipped bit makes one name another's
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _problem(folder: Path, name: str, expected: dict) -> str | None:
    """Return what is wrong with a file of a checkpoint, None if it is intact."""
    if name.startswith("/") or ".." in name.split("/"):
        return "missing"  # what lies outside of the folder is no part of the checkpoint
    try:
        described = _describe(folder / name)
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except ValueError:  # a null byte in the name
        return "missing"
    return None if described == expected else "its bytes differ from its hash"


def check_free_space(folder: Path, needed: int) -> None:
    """Raise OSError if there is no room for a checkpoint of `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"a checkpoint takes {needed / 1e6:,.0f} MB but only {free / 1e6:,.0f} MB are free: "
            f"make room, or keep fewer checkpoints (checkpoint.keep_last)",
            str(folder),
        )


def commit_staged(staging: Path, target: Path) -> None:
    """Commit a complete checkpoint: fsync, then atomic rename to its final name."""
    flush_to_disk(staging)
    if target.exists():  # it is damaged, from before a rollback, or from before an evaluation
        target.rename(target.with_name(f".{target.name}.old"))
    staging.rename(target)
    flush(target.parent)


def restore_replaced(folder: Path) -> None:
    """Put back a checkpoint whose replacement was interrupted between the renames."""
    for path in folder.glob(".step-*.old"):
        target = path.with_name(path.name.removeprefix(".").removesuffix(".old"))
        if not target.exists():
            path.rename(target)
            flush(folder)


def remove_leftovers(folder: Path) -> None:
    """Remove the files of interrupted saves and of replaced or pruned checkpoints.

    A file that cannot be removed, such as one in use on a network file system, is removed the next
    time.
    """
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def check_kept(*, keep_last: int, keep_every: int | None, keep_best: str | None) -> None:
    """Raise ValueError for a rule of what is kept that would keep nothing, or not what it says."""
    check_value(keep_last, "keep_last", int, minimum=0)
    check_value(keep_every, "keep_every", int | None, minimum=1)
    check_measure(keep_best, "keep_best")


def prune(
    folder: Path,
    newest: Path,
    *,
    keep_last: int,
    keep_every: int | None,
    steps: Container[int] = (),
    later: bool = True,
) -> None:
    """Retire the checkpoints that `newest`, just committed, makes obsolete.

    Keeps the `keep_last` newest (0: all) and every checkpoint whose step is a multiple of
    `keep_every`, and those of the `steps`. Checkpoints of `later` steps are obsolete too: they
    precede a rollback.
    """
    obsolete = [path for path in _by_age(folder) if later and path.name > newest.name]
    if keep_last:
        earlier = [path for path in _by_age(folder) if path.name < newest.name]
        too_old = earlier[: max(0, len(earlier) + 1 - keep_last)]
        spared = [p for p in too_old if keep_every and step_of(p) % keep_every == 0]
        spared += [path for path in too_old if step_of(path) in steps]
        obsolete += [path for path in too_old if path not in spared]
    for path in obsolete:
        try:
            # Rename before deleting, so that a half-deleted one is not taken for a checkpoint.
            path.rename(folder / f".{path.name}.old")
        except OSError as error:  # does not affect the new checkpoint
            warnings.warn(f"cannot remove an obsolete checkpoint: {error}", stacklevel=2)
    if obsolete:  # before their files go: a power cut must not give back names without files
        with suppress(OSError):  # it does not affect the new checkpoint either
            flush(folder)


def _by_age(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if NAME.fullmatch(path.name))


def step_of(path: Path) -> int:
    """Return the step of a checkpoint, from the name of its folder."""
    return int(NAME.fullmatch(path.name)[1])


def describe_files(path: Path, digests: dict[str, str] | None = None) -> dict[str, dict]:
    """Return the size and xxh3_128 of every file of a checkpoint, except the file list itself.

    Files with a hash in `digests` are not read.
    """
    described = {}
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        name = file.relative_to(path).as_posix()
        if name != FILES:
            described[name] = _describe(file, (digests or {}).get(name))
    return described


def _describe(file: Path, digest: str | None = None) -> dict:
    return {"xxh3_128": digest or hash_file(file), "bytes": file.stat().st_size}
