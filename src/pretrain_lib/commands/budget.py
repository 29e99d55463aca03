"""`pretrain train --budget`: the length of a run for which a time suffices on this machine."""

import os
import tempfile
from pathlib import Path

import yaml

from pretrain_lib.commands.launching import launch_into
from pretrain_lib.files.writes import make_folder
from pretrain_lib.run_folder.folder import CHECKPOINTS
from pretrain_lib.run_folder.metrics import human, human_time
from pretrain_lib.tuning.proxy import Settings, as_flags, shorter_schedule
from pretrain_lib.tuning.record import MEASURED_STEPS, measured_speed

MARGIN = 0.9  # of the budget is planned: machines slow down under load
FORWARD = 1 / 3  # of the operations of a step, which validation takes for each token
FEWEST_STEPS = 32  # of a run, or its schedule says little
CONFIG = "config.yaml"
CHOSEN = ("tokens", "epochs", "warmup_tokens", "warmup_fraction", "decay_tokens")


def within_budget(words: list[str], settings: Settings, budget: float) -> list[str]:
    """Return the flags by which a run takes at most `budget` seconds to train and validate.

    `words` start the run, `settings` are its own. A few steps are measured, which prepares the data
    if they are not there. A run that is resumed keeps the schedule it began with. Raises ValueError
    for a schedule without tokens, and a budget in which hardly a step fits; Stopped if it was.
    """
    folder = Path(settings["run"]["dir"])
    if any((folder / CHECKPOINTS).glob("step-*")):
        schedule = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))["schedule"]
        return as_flags({f"schedule.{name}": schedule[name] for name in CHOSEN})
    whole = settings["schedule"]["tokens"]
    if whole is None:
        raise ValueError(
            f"budget={budget:.0f}s: schedule.epochs={settings['schedule']['epochs']} does not say "
            f"how long the whole run is; give schedule.tokens"
        )
    speed = _measure(words, folder)
    tokens = tokens_within(settings, speed, budget)
    amount = f"{human(speed)} tokens a second: {human_time(budget)} are enough for"
    if tokens >= whole:
        print(f"{amount} all {human(whole)} tokens of the schedule", flush=True)
        return []
    print(f"{amount} {human(tokens)} of the schedule's {human(whole)} tokens", flush=True)
    return as_flags(shorter_schedule(settings, tokens))


def tokens_within(settings: Settings, speed: float, budget: float) -> int:
    """Return the tokens, in whole steps, that `speed` tokens a second leave for `budget` seconds.

    Validation counts, at the start, at the end and at the recipe's intervals; scores and samples
    do not. Raises ValueError if there are fewer than `FEWEST_STEPS` steps.
    """
    batch, validation = settings["batch"]["tokens"], settings["validation"]
    each = 0.0  # seconds of a validation
    if settings["data"]["validation"] != "none":
        each = FORWARD * (validation["tokens"] or 0) / speed
    step = batch / speed + each / validation["every"]
    steps = int((budget * MARGIN - 2 * each) / step)
    if steps < FEWEST_STEPS:
        least = (FEWEST_STEPS * step + 2 * each) / MARGIN
        raise ValueError(
            f"budget={budget:.0f}s is too short for {FEWEST_STEPS} steps of {batch:,} tokens at "
            f"{speed:,.0f} tokens a second: give {least / 60:.1f}m or more, or a smaller "
            f"--batch.tokens"
        )
    return steps * batch


def _measure(words: list[str], folder: Path) -> float:
    """Return the speed of a few steps of a run, in tokens per second."""
    print(f"measuring {MEASURED_STEPS} steps", flush=True)
    make_folder(folder.parent)
    with tempfile.TemporaryDirectory(prefix=".budget-", dir=folder.parent) as name:
        run = Path(name, "run")
        own = {"run.dir": run, "run.max_steps": MEASURED_STEPS, "log.every": 1}
        own |= {"samples.prompts": [], "scores.tasks": [], "validation.every": 10**9}
        console = Path(tempfile.gettempdir(), f"pretrain-budget-{os.getpid()}.log")
        launch_into(console, [*words, *as_flags(own)])
        console.unlink()
        return measured_speed(run)[0]
