"""The subcommand tune: find the learning rates of a recipe by short runs of a smaller model."""

import argparse
import math
import shlex
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from pretrain_lib.commands.budget import folder_to_measure, measure_steps
from pretrain_lib.commands.launching import Stopped, launch_into, on_signals, read_settings, stop
from pretrain_lib.commands.recipes import (
    add_tune_flags,
    find_overlays,
    find_recipe,
    launch_flags,
    split_flags,
)
from pretrain_lib.errors import DONE, RESUMABLE
from pretrain_lib.files.locks import lock_folder
from pretrain_lib.files.outputs import check_folder
from pretrain_lib.files.writes import write_json
from pretrain_lib.report.tuned import draw_search
from pretrain_lib.run_folder.metrics import human, human_time
from pretrain_lib.tuning.proxy import (
    RATES,
    Cost,
    Settings,
    as_flags,
    check_searchable,
    choose_tokens,
    common_settings,
    default_width,
    rates_of,
    trial_settings,
    without_flags,
)
from pretrain_lib.tuning.record import (
    MEASURED_STEPS,
    PLAN,
    await_run,
    drop_checkpoints,
    read_loss,
    read_plan,
    run_folder,
    write_result,
)
from pretrain_lib.tuning.scaling import BASE, MATRIX, at_width
from pretrain_lib.tuning.search import (
    Found,
    Space,
    Trial,
    expected_trials,
    find_rates,
    round_rate,
)

PICTURE = "tune.png"


@dataclass
class Tuning:
    """A search that is going on."""

    recipe: str
    """As the user named it."""
    flags: list[str]
    """Of the user, for the recipe."""
    words: list[str]
    """What `accelerate launch` is given before the settings of a run."""
    settings: Settings
    """Of the recipe."""
    shared: Settings
    """Of all runs, before the rates and the schedule of each."""
    names: tuple[str, ...]
    width: int
    out: Path


def run_tune(options: argparse.Namespace) -> int:
    """Find the learning rates of a recipe; the same command continues what was interrupted."""
    chosen, flags = split_flags(options, add_tune_flags)
    recipe = find_recipe(options.recipe)
    overlays = find_overlays(flags, recipe.parent)
    out = chosen.out or Path("runs", f"tune_{recipe.stem}")
    settings = read_settings(recipe, overlays)
    check_searchable(settings)
    width = chosen.width or default_width(settings["model"])
    common = as_flags(common_settings(settings, width))
    shared = read_settings(recipe, [*overlays, *common])
    names = RATES[settings["optimizer"]["kind"]]
    check_folder(out, named="--out ", kind="a search", is_ours=lambda f: (f / PLAN).is_file())
    try:
        with on_signals(stop), lock_folder(out, setting="out"):
            words = ["--quiet", *launch_flags(chosen), str(recipe), *overlays, *common]
            tuning = Tuning(options.recipe, flags, words, settings, shared, names, width, out)
            _tune(tuning, budget=chosen.budget)
    except Stopped:
        print("stopped: the same command goes on", flush=True)
        return RESUMABLE
    return DONE


def _tune(tuning: Tuning, *, budget: float) -> None:
    request = {"recipe": tuning.recipe, "flags": tuning.flags, "width": tuning.width}
    request |= {"budget": budget, "settings": tuning.shared}
    plan = read_plan(tuning.out, request)
    if "tokens" not in plan:
        cost = _measure(tuning, budget)
        tokens = choose_tokens(tuning.settings, tuning.names, cost, budget)
        plan |= {"tokens": tokens, "cost": asdict(cost)}
        write_json(tuning.out / PLAN, plan)
    space = Space(rates_of(tuning.settings, tuning.names), plan["tokens"])
    losses: dict[Trial, float] = {}
    follow = _Progress(expected_trials(space), Cost(**plan["cost"]))
    print(follow.announce(tuning.width, space), flush=True)

    def evaluate(trial: Trial) -> float:
        started = time.monotonic()
        losses[trial], is_new = _run(tuning, trial)
        follow.count(trial, seconds=time.monotonic() - started if is_new else None)
        print(follow.line(tuning.names, trial, losses[trial]), flush=True)
        return losses[trial]

    result = find_rates(space, evaluate)
    _tell(tuning, space, result, losses)


def _measure(tuning: Tuning, budget: float) -> Cost:
    """Prepare the data, and measure a few steps of the smaller model."""
    several = 100 * tuning.settings["batch"]["tokens"]  # longer than any warm-up
    trial = Trial(rates_of(tuning.settings, tuning.names), several)
    settings = trial_settings(tuning.settings, tuning.names, trial)
    words = [*tuning.words, *as_flags(settings)]
    with folder_to_measure(beside=tuning.out) as (run, console):
        what = f"measuring {MEASURED_STEPS} steps of width {tuning.width}"
        print(f"{what}; progress is logged to {console}", flush=True)
        launch_into(console, [*words, *as_flags({"run.max_steps": 0})], run)
        started = time.monotonic()
        measured = measure_steps(console, words, run, budget)
        seconds = time.monotonic() - started
    remaining = max(0.0, seconds - measured.seconds)
    return Cost(tokens_per_second=measured.tokens_per_second, seconds=remaining)


def _run(tuning: Tuning, trial: Trial) -> tuple[float, bool]:
    """Return the validation loss of a trial, and whether it was run now."""
    folder = run_folder(tuning.out, trial)
    await_run(folder)
    loss = read_loss(folder)
    if is_new := loss is None:
        _start(tuning, trial, folder)
        loss = read_loss(folder)
        assert loss is not None, f"{folder} has ended, and has no loss"
    drop_checkpoints(folder)
    return loss, is_new


def _start(tuning: Tuning, trial: Trial, folder: Path) -> None:
    """Run or resume a trial; raises ValueError if it fails for another reason than its rates."""
    settings = trial_settings(tuning.settings, tuning.names, trial)
    console = folder.with_name(f"{folder.name}.log")
    try:
        if not launch_into(console, [*tuning.words, *as_flags(settings)], folder):
            raise Stopped
    except ValueError:
        if read_loss(folder) is None:
            raise


class _Progress:
    """Tells how far a search is, and how long the rest takes at the speed of its runs so far."""

    def __init__(self, expected: list[int], cost: Cost) -> None:
        self._expected, self._cost, self._done = expected, cost, 0
        self._planned, self._taken = 0.0, 0.0  # seconds of the runs of this process

    def announce(self, width: int, space: Space) -> str:
        number, seconds = len(self._expected), sum(map(self._cost.of, self._expected))
        return (
            f"{number} runs of width {width} and {human(space.first_tokens)} to "
            f"{human(space.tokens)} tokens, about {human_time(seconds)} in all"
        )

    def count(self, trial: Trial, *, seconds: float | None) -> None:
        self._done += 1
        if seconds is not None:
            self._planned += self._cost.of(trial.tokens)
            self._taken += seconds

    def line(self, names: tuple[str, ...], trial: Trial, loss: float) -> str:
        left = sum(map(self._cost.of, self._expected[self._done :]))
        left *= self._taken / self._planned if self._planned else 1.0
        result = f"loss {loss:.4f}" if math.isfinite(loss) else "diverged"
        rates = ", ".join(f"{n} {r:g}" for n, r in zip(names, trial.rates, strict=True))
        number = max(len(self._expected), self._done)
        time_left = f", {human_time(left)} left" if left else ""
        return f"{self._done}/{number}  {human(trial.tokens)} tokens, {rates}: {result}{time_left}"


def _tell(tuning: Tuning, space: Space, found: Found, losses: dict[Trial, float]) -> None:
    """Write the result and its picture, and print them."""
    tuned = dict(zip(tuning.names, found.trial.rates, strict=True))
    kind, wanted = tuning.settings["optimizer"]["kind"], tuning.settings["model"]["width"]
    rates = at_width(tuned, kind=kind, tuned=tuning.width, wanted=wanted)
    default_loss = losses.get(Trial(space.center, space.tokens))
    write_result(
        tuning.out,
        tuning.names,
        losses,
        loss=found.loss,
        at_width={tuning.width: tuned} | {wanted: rates},
    )
    picture = tuning.out / PICTURE
    draw_search(
        losses, tuning.names, found.trial, picture, title=f"{tuning.recipe} at width {tuning.width}"
    )
    compared = f" (the recipe's own rates: {default_loss:.4f})" if default_loss else ""
    print(
        f"\nlowest validation loss at width {tuning.width} after {human(space.tokens)} tokens: "
        f"{found.loss:.4f}{compared}"
    )
    for name, rate in rates.items():
        text = f"  optimizer.{name:<25}{tuned.get(name, tuned[BASE]):g} at width {tuning.width}"
        print(text + (f", {round_rate(rate):g} at {wanted}" if wanted != tuning.width else ""))
    settings = {f"optimizer.{name}": round_rate(rate) for name, rate in rates.items()}
    if tuning.settings["optimizer"][MATRIX] is not None:
        settings.setdefault(f"optimizer.{MATRIX}", None)  # it was the base rate
    flags = without_flags(tuning.flags, set(settings))
    words = ["pretrain", "train", tuning.recipe, *flags, *as_flags(settings)]
    print(f"picture: {picture}\n\n{shlex.join(words)}")
