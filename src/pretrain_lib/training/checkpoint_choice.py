"""Choose the checkpoint from which a run starts, by `run.resume` and by what the run has."""

from pathlib import Path

from pretrain_lib.checkpoint.folders import (
    find_newest,
    prune,
    remove_leftovers,
    restore_replaced,
    still_there,
    verify_checkpoint,
)
from pretrain_lib.checkpoint.state import read_state
from pretrain_lib.config.settings import Recipe
from pretrain_lib.files.reading import read_if_whole
from pretrain_lib.run_folder.folder import (
    CHECKPOINTS,
    MANIFEST,
    read_status,
    setting_changes,
    unsafe_changes,
    was_begun_here,
)
from pretrain_lib.values import did_you_mean
from pretrain_lib.wording import plural

CHOICES = ("auto", "never")  # special values of `run.resume`; anything else is a path


def check_resume(config: Recipe) -> None:
    """Raise ValueError if `run.resume` is not there, unless the run has been started from it.

    Of the run's own checkpoints, `choose_checkpoint` knows more.
    """
    wanted, checkpoints = config.run.resume, Path(config.run.dir, CHECKPOINTS).resolve()
    is_known = wanted in CHOICES or wanted == _last_settings(config)["run"]["resume"]
    if not (is_known or Path(wanted).is_dir() or Path(wanted).parent.resolve() == checkpoints):
        raise ValueError(
            f"run.resume={wanted} is not a whole checkpoint, there is no such folder; give "
            f"{', '.join(CHOICES)}, RUN/checkpoints/step-NNNNNNNN or a run folder"
            f"{did_you_mean(wanted, CHOICES)}"
        )


def choose_checkpoint(config: Recipe) -> tuple[Path | None, bool]:
    """Return the checkpoint to load, if any, and whether loading it makes this run a fork."""
    folder, wanted = Path(config.run.dir) / CHECKPOINTS, config.run.resume
    restarted = was_begun_here(folder.parent)
    if wanted == "never" and not restarted:
        return None, False
    named = None if wanted in CHOICES else Path(wanted)
    if named is not None and (named / CHECKPOINTS).is_dir():
        named = find_newest(named / CHECKPOINTS) or named
    is_own = named is not None and named.resolve().parent == folder.resolve()
    if is_own and not restarted and not _went_back(config):
        return _whole(named), False
    restore_replaced(folder)
    if (newest := find_newest(folder)) is not None:  # also for a fork with checkpoints of its own
        settings = config.checkpoint
        state, _ = read_state(newest)
        prune(  # old ones are back after a power cut
            folder,
            newest,
            keep_last=settings.keep_last,
            keep_every=settings.keep_every,
            steps={state.step_of_best(settings.keep_best), state.turn_back_to},
            later=False,
        )
        remove_leftovers(folder)
        return newest, False
    if broken := [path for path in folder.glob("step-*") if path.is_dir()]:
        raise ValueError(
            f"{folder} holds {plural(len(broken), 'checkpoint')} and none is whole "
            f"({verify_checkpoint(max(broken))[0]}): restore one, or delete them to start anew"
        )
    if (reached := read_status(folder.parent).get("step") or 0) > 0:
        raise ValueError(
            f"run.dir={folder.parent} had a checkpoint of step {reached} and has none: a start "
            f"from the beginning would drop its metrics; put the checkpoint back, or give another "
            f"folder"
        )
    return (None, False) if named is None else (_whole(named), True)


def _last_settings(config: Recipe) -> dict:
    """Return the settings with which the run was last started."""
    return read_if_whole(Path(config.run.dir) / MANIFEST).get("config") or {"run": {"resume": None}}


def _went_back(config: Recipe) -> bool:
    """Return whether the run has gone back as it is told to, and now goes on."""
    before, now = _last_settings(config), config.to_dict()
    is_same = before["run"]["resume"] == config.run.resume
    return is_same and not unsafe_changes(setting_changes(before, now), allowed=[])


def _whole(path: Path) -> Path:
    with still_there(path):
        if problems := verify_checkpoint(path):
            raise ValueError(
                f"run.resume={path} is not a whole checkpoint ({problems[0]}); give "
                f"RUN/checkpoints/step-NNNNNNNN or a run folder"
            )
    return path
