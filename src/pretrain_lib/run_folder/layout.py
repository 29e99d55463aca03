"""Tell run folders from other folders, and undo what a refused start has written."""

from contextlib import suppress
from pathlib import Path

from pretrain_lib.checkpoint.folders import NAME
from pretrain_lib.corpus.corpus import SPOOL_FOLDER
from pretrain_lib.files.locks import HOLDER, LOCK
from pretrain_lib.files.outputs import check_folder, foreign_files
from pretrain_lib.files.reading import read_object
from pretrain_lib.files.writes import write_atomically
from pretrain_lib.run_folder.status import STATES, STATUS

CHECKPOINTS = "checkpoints"
RECIPE = "recipe.yaml"  # the settings of the recipe itself, before presets, overlays and flags
MANIFEST = "manifest.json"
METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
ERRORS = "error.log"  # the tracebacks of errors that nobody expected
# What there may be before the manifest.
EARLY = {CHECKPOINTS, RECIPE, STATUS, SPOOL_FOLDER, ERRORS}


def check_run_folder(folder: Path) -> None:
    """Raise ValueError unless a run folder is new, empty or that of a run."""
    check_folder(folder, named="run.dir=", kind="a run folder", is_ours=is_run_folder)


def is_run_folder(folder: Path) -> bool:
    """Return whether a folder was made by a run, by its checkpoints, manifest, status or lock."""
    checkpoints = folder / CHECKPOINTS
    if checkpoints.is_dir() and any(NAME.fullmatch(path.name) for path in checkpoints.iterdir()):
        return True
    if _object(folder / MANIFEST).keys() >= {"config", "data_fingerprint"}:
        return True
    if _object(folder / STATUS).get("state") in STATES:
        return True
    names = set(foreign_files(folder))
    # A run without a manifest yet, perhaps because it was killed: it begins with its lock and its
    # recipe, or, in a script of one's own, with the spool of its stream, which has a lock too.
    has_begun = names <= EARLY or {CHECKPOINTS, RECIPE} <= names
    locks = (folder / LOCK, folder / HOLDER, folder / SPOOL_FOLDER / LOCK)
    return has_begun and any(lock.exists() for lock in locks)


def _object(path: Path) -> dict:
    """Return the object in a JSON file, empty if there is none."""
    try:
        return read_object(path)
    except (OSError, ValueError):
        return {}


def remember(folder: Path) -> dict[Path, bytes | None]:
    """Return what the start of a run may change before it begins, with its content."""
    paths = (folder / name for name in (RECIPE, STATUS, MANIFEST))
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


def put_back(folder: Path, before: dict[Path, bytes | None]) -> bool:
    """Undo what a refused start has changed; return whether it was refused before it began."""
    manifest = folder / MANIFEST
    if (manifest.read_bytes() if manifest.is_file() else None) != before[manifest]:
        return False
    for path, content in before.items():
        if content is None:
            path.unlink(missing_ok=True)
        elif path.read_bytes() != content:
            write_atomically(path, content)
    with suppress(OSError):  # it holds checkpoints
        (folder / CHECKPOINTS).rmdir()
    return True
