"""`pretrain train --budget`: the length of a run for which a time suffices on this machine."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from pretrain_lib.commands.launching import RunError, launch_into
from pretrain_lib.config.units import show_duration
from pretrain_lib.files.writes import make_folder
from pretrain_lib.run_folder.folder import CHECKPOINTS, check_usable
from pretrain_lib.run_folder.metrics import human, human_time
from pretrain_lib.run_folder.status import read_status
from pretrain_lib.tuning.proxy import (
    FEWEST_STEPS,
    Settings,
    as_flags,
    check_shortened,
    shorter_schedule,
)
from pretrain_lib.tuning.record import MEASURED_STEPS, Measured, read_measured

MARGIN = 0.9  # of the budget is planned: machines slow down under load
FORWARD = 1 / 3  # of the operations of a step, which validation takes for each token
FEWEST_MEASURED = 2  # steps, of which the first is left out
START_SECONDS = 30  # that a run may take to begin
CONFIG = "config.yaml"
DECAY = {"decay_tokens", "decay_fraction"}
CHOSEN = {
    "tokens",
    "epochs",
    "warmup_tokens",
    "warmup_fraction",
    *DECAY,
    "continue_at_floor",
}
# What the run that is measured leaves out.
MEASURED = {
    "validation.every": 10**9,  # at the start and at the end
    "samples.prompts": [],
    "scores.tasks": [],
    "checkpoint.keep_best": None,
    "system.profile": None,
}


def within_budget(words: list[str], settings: Settings, budget: float) -> list[str]:
    """Return the flags by which a run takes at most `budget` seconds to train and validate.

    `words` start the run, `settings` are its own. A few steps are measured, which prepares the data
    if they are not there. A run that is resumed keeps the schedule it began with. Raises ValueError
    for a schedule that cannot be shortened, and a budget in which hardly a step fits; Stopped if
    the measurement was.
    """
    folder, resume = Path(settings["run"]["dir"]), settings["run"]["resume"]
    check_usable(folder, resume=resume)
    if any((folder / CHECKPOINTS).glob("step-*")):
        schedule = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))["schedule"]
        print(f"{folder} goes on with the schedule that it began with", flush=True)
        names = CHOSEN if schedule["kind"] == "wsd" else CHOSEN - DECAY
        present = sorted(names & schedule.keys())  # an older run has no decay_fraction
        return as_flags({f"schedule.{name}": schedule[name] for name in present})
    if resume not in ("auto", "never"):
        raise ValueError(
            f"budget={show_duration(budget)}: a run that begins with run.resume={resume} has a "
            f"schedule of which a part is done; give schedule.tokens instead"
        )
    check_shortened(settings)
    whole = settings["schedule"]["tokens"]
    if whole <= FEWEST_STEPS * settings["batch"]["tokens"]:
        print(f"at most {FEWEST_STEPS} steps, which are not shortened", flush=True)
        return []
    measured = _measure(words, folder, budget)
    tokens = tokens_within(settings, measured, budget)
    speed = human(measured.tokens_per_second)
    amount = f"{speed} tokens a second: {human_time(budget)} are enough for"
    if tokens >= whole:
        print(f"{amount} all {human(whole)} tokens of the schedule", flush=True)
        return []
    print(f"{amount} {human(tokens)} of the schedule's {human(whole)} tokens", flush=True)
    return as_flags(shorter_schedule(settings, tokens))


def tokens_within(settings: Settings, measured: Measured, budget: float) -> int:
    """Return the tokens of a schedule, in whole steps, for which `budget` seconds suffice.

    Validation counts, at the start, at the end and at the recipe's intervals, and so does what is
    trained at the floor after the schedule; scores and samples do not. Raises ValueError if there
    are fewer than `FEWEST_STEPS` steps.
    """
    batch, schedule = settings["batch"]["tokens"], settings["schedule"]
    speed = measured.tokens_per_second
    each = FORWARD * measured.validated / speed  # seconds of a validation
    step = batch / speed + each / settings["validation"]["every"]
    step *= 1 + (schedule["continue_at_floor"] or 0) / schedule["tokens"]
    steps = int((budget * MARGIN - 2 * each) / step)
    if steps < FEWEST_STEPS:
        least = (FEWEST_STEPS * step + 2 * each) / MARGIN
        raise ValueError(
            f"budget={show_duration(budget)} is too short for {FEWEST_STEPS} steps of {batch:,} "
            f"tokens at {speed:,.0f} tokens a second, and validations of {measured.validated:,} "
            f"tokens: give {least / 60:.1f}m or more, or a smaller --batch.tokens or "
            f"--validation.tokens"
        )
    return steps * batch


def _measure(words: list[str], folder: Path, budget: float) -> Measured:
    """Measure a few steps of a run."""
    make_folder(folder.parent)
    with folder_to_measure(beside=folder) as (run, console):
        what = f"measuring {MEASURED_STEPS} steps, once the data are prepared"
        print(f"{what}; progress is logged to {console}", flush=True)
        return measure_steps(console, [*words, *as_flags(MEASURED)], run, budget)


@contextmanager
def folder_to_measure(*, beside: Path) -> Iterator[tuple[Path, Path]]:
    """Yield the folder of a run that is measured, and the file for what it prints.

    The folder is made beside another and dropped; the file stays only if the run has failed.
    """
    with tempfile.TemporaryDirectory(prefix=".measured-", dir=beside.parent) as name:
        run = Path(name, "run")
        console = Path(tempfile.gettempdir(), f"pretrain-measured-{os.getpid()}.log")
        has_failed = False
        try:
            yield run, console
        except RunError:  # its message names the file
            has_failed = True
            raise
        finally:
            if not has_failed:
                console.unlink(missing_ok=True)


def measure_steps(console: Path, words: list[str], folder: Path, budget: float) -> Measured:
    """Run a few steps into `folder`, for not much longer than `budget` seconds, and measure them.

    `words` start the run, which writes to the file `console`. Raises ValueError if it fails or the
    time is over after one step, Stopped if it is told to stop.
    """
    overrides = {"run.max_steps": MEASURED_STEPS, "log.every": 1}
    overrides |= {"run.max_time": f"{budget + START_SECONDS:.1f}s"}
    for _ in range(2):  # the first time may have gone into the preparation of the data
        is_done = launch_into(console, [*words, *as_flags(overrides)], folder)
        if is_done or read_status(folder)["step"] >= FEWEST_MEASURED:
            return read_measured(folder)
    raise ValueError(
        f"budget={show_duration(budget)} is too short to measure {FEWEST_MEASURED} steps in: give "
        f"more, or a smaller --batch.tokens"
    )
