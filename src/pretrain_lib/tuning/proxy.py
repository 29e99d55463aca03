"""The proxy of a recipe, in which its learning rates are found: a smaller model, shorter runs.

Settings are nested dictionaries, as `--print_config` prints them.
"""

import math
import shlex
from dataclasses import dataclass
from typing import Any

from pretrain_lib.config.flags import FLAG
from pretrain_lib.config.units import show_duration
from pretrain_lib.tuning.scaling import BASE, EMBEDDING, MATRIX
from pretrain_lib.tuning.search import (
    KEPT,
    ROUNDS,
    Space,
    Trial,
    expected_trials,
    round_rate,
)

Settings = dict[str, dict[str, Any]]
WIDTH = 256  # of the smaller model, or the next narrower one that its heads allow
VALIDATION_TOKENS = 262_144  # that a run is judged by, if the recipe's are not fewer
FEWEST_STEPS = 32  # of a run that is shortened, or its schedule says little
SAVES = 4  # checkpoints of a run, from which it goes on when it was interrupted
ROWS = 50  # of metrics in a run, at most
MARGIN = 0.9  # of the budget is planned: neighbors beyond the first take the rest
# The rates that are searched, by the kind of the optimizer.
RATES = {"adamw": (BASE, EMBEDDING), "muon": (MATRIX, EMBEDDING, BASE)}


@dataclass(frozen=True)
class Cost:
    """What a run takes on this machine."""

    tokens_per_second: float
    seconds: float
    """Beside the steps: start, validation, the last checkpoint."""

    def of(self, tokens: int) -> float:
        """Return the seconds of a run of so many tokens."""
        return self.seconds + tokens / self.tokens_per_second


def rates_of(settings: Settings, names: tuple[str, ...]) -> tuple[float, ...]:
    """Return the recipe's own rates; one that is null is the base rate."""
    optimizer = settings["optimizer"]
    rates = (optimizer[BASE if optimizer[name] is None else name] for name in names)
    return tuple(round_rate(rate) for rate in rates)


def unit_width(model: dict[str, Any]) -> int:
    """Return the width that belongs to one head of keys and values: widths are multiples of it."""
    groups = model.get("num_key_value_heads") or model["num_heads"]
    return model["width"] // groups


def default_width(model: dict[str, Any]) -> int:
    """Return the width of the smaller model, if none was asked for."""
    unit = unit_width(model)
    return min(model["width"], max(unit, WIDTH // unit * unit))


def narrower(model: dict[str, Any], width: int) -> dict[str, int]:
    """Return the settings that make a model as narrow as `width`, with heads as wide as before.

    Depth, context and vocabulary stay. Raises ValueError for a width of no whole number of heads.
    """
    unit, whole = unit_width(model), model["width"]
    if width % unit or not unit <= width <= whole:
        nearest = min(max(1, round(width / unit)) * unit, whole)
        raise ValueError(
            f"width={width} must be a multiple of {unit}, which is the recipe's width for each "
            f"head of keys and values, and at most model.width={whole}; nearest: {nearest}"
        )
    scaled = ("width", "num_heads", "num_key_value_heads", "mlp_width")
    return {name: max(1, round(model[name] * width / whole)) for name in scaled if name in model}


def choose_tokens(settings: Settings, names: tuple[str, ...], cost: Cost, budget: float) -> int:
    """Return the tokens of the longest runs for which the budget, in seconds, suffices.

    They are a multiple of 9 steps, and no more than those of the recipe. Raises ValueError if the
    shortest runs would have fewer than `FEWEST_STEPS` steps.
    """
    unit = settings["batch"]["tokens"] * KEPT ** (ROUNDS - 1)
    counts = expected_trials(Space(center=(1.0,) * len(names), tokens=unit))
    left = budget * MARGIN - cost.seconds * len(counts)
    steps = math.floor(left * cost.tokens_per_second / sum(counts))
    if steps < FEWEST_STEPS:
        least = cost.seconds * len(counts)
        least += FEWEST_STEPS * sum(counts) / cost.tokens_per_second
        raise ValueError(
            f"budget={show_duration(budget)} is too short for {len(counts)} runs, of which the "
            f"shortest have at least {FEWEST_STEPS} steps of "
            f"batch.tokens={settings['batch']['tokens']}: give "
            f"{math.ceil(least / MARGIN / 60)}m or more, or a smaller --width or --batch.tokens"
        )
    whole = settings["schedule"]["tokens"]
    if whole < FEWEST_STEPS * unit:
        raise ValueError(
            f"schedule.tokens={whole} is too short for a search, whose longest runs have at least "
            f"{FEWEST_STEPS * unit:,} tokens: give more, or a smaller --batch.tokens"
        )
    return unit * min(steps, whole // unit)


def trial_settings(settings: Settings, names: tuple[str, ...], trial: Trial) -> dict[str, Any]:
    """Return the settings of a trial by dotted name: rates, and a schedule in proportion."""
    steps = trial.tokens // settings["batch"]["tokens"]
    return {
        **{f"optimizer.{name}": rate for name, rate in zip(names, trial.rates, strict=True)},
        **({} if MATRIX in names else {f"optimizer.{MATRIX}": None}),  # as the base rate
        **shorter_schedule(settings, trial.tokens),
        "schedule.continue_at_floor": None,
        "log.every": max(1, steps // ROWS),
        "checkpoint.every": max(1, steps // SAVES),
    }


def shorter_schedule(settings: Settings, tokens: int) -> dict[str, Any]:
    """Return the settings of a schedule of `tokens` tokens, by dotted name, in proportion.

    `check_shortened` has passed.
    """
    schedule, whole = settings["schedule"], settings["schedule"]["tokens"]
    floor_tokens = round((schedule["continue_at_floor"] or 0) / whole * tokens)
    warmup = schedule["warmup_fraction"]
    if schedule["warmup_tokens"] is not None:
        warmup = schedule["warmup_tokens"] / whole
    return {
        "schedule.tokens": tokens,
        "schedule.epochs": None,
        "schedule.warmup_tokens": None,
        "schedule.warmup_fraction": warmup,
        **_shorter_decay(schedule, tokens),
        "schedule.continue_at_floor": floor_tokens
        if floor_tokens >= settings["batch"]["tokens"]
        else None,
    }


def _shorter_decay(schedule: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Return the length of the decay in a schedule of `tokens` tokens, if it has such a phase."""
    if schedule["kind"] != "wsd":
        return {}
    share = schedule["decay_fraction"]
    if share is None:
        share = schedule["decay_tokens"] / schedule["tokens"]
    return {"schedule.decay_tokens": round(share * tokens), "schedule.decay_fraction": None}


def check_shortened(settings: Settings) -> None:
    """Raise ValueError for a schedule that cannot be shortened in proportion."""
    if settings["schedule"]["tokens"] is None:
        raise ValueError(
            f"schedule.epochs={settings['schedule']['epochs']}: give the length of the run as "
            f"schedule.tokens, in proportion to which it is shortened"
        )
    for name in ("ramp_from", "ramp_increment", "ramp_tokens"):
        if settings["batch"][name] is not None:
            raise ValueError(
                f"batch.{name}={settings['batch'][name]}: a ramp of the batch does not become "
                f"shorter with the run; give --batch.{name} null"
            )


def common_settings(settings: Settings, width: int) -> dict[str, Any]:
    """Return the settings that all trials share, by dotted name."""
    validation = settings["validation"]["tokens"]
    return {
        **{f"model.{k}": v for k, v in narrower(settings["model"], width).items()},
        "validation.every": 10**9,  # at the start and at the end
        "validation.tokens": min(VALIDATION_TOKENS, validation or VALIDATION_TOKENS),
        "samples.prompts": [],
        "scores.tasks": [],
        "checkpoint.every_tokens": None,
        "checkpoint.keep_last": 1,
        "checkpoint.keep_best": None,
        "run.max_steps": None,
        "system.profile": None,
    }


def check_searchable(settings: Settings) -> None:
    """Raise ValueError for a recipe whose rates cannot be found by short runs."""
    if "width" not in settings["model"]:
        raise ValueError(
            "model.config: a model of transformers cannot be made narrower, as the search does; "
            "take gpt2_124m, llama_1_3b or a recipe with such a model"
        )
    _check_begins_anew(settings["run"])
    check_shortened(settings)
    if settings["data"]["validation"] == "none":
        raise ValueError(
            "data.validation=none: runs are compared by their validation loss, so hold out text"
        )
    if not settings["optimizer"][BASE]:
        raise ValueError(f"optimizer.{BASE}=0: the search begins around the recipe's own rates")


def _check_begins_anew(run: dict[str, Any]) -> None:
    """Raise ValueError for a run that begins with weights that are there."""
    for name in ("resume", "initial_weights"):
        value = run[name]
        if value not in ("auto", "never", None):
            raise ValueError(
                f"run.{name}={value}: the search trains a narrower model from the beginning, and "
                f"weights cannot be made narrower; leave it out"
            )


def as_flags(settings: dict[str, Any]) -> list[str]:
    """Return the flags of a recipe for settings by dotted name."""
    flags = []
    for name, value in settings.items():
        flags += [f"--{name}", "null" if value is None else str(value)]
    return flags


def flag_values(flags: list[str]) -> dict[str, str]:
    """Return the values of flags by name; those of one that is given again are joined."""
    values: dict[str, list[str]] = {}
    name = ""
    for word in flags:
        if FLAG.match(word):
            name, equals, value = word.partition("=")
            values.setdefault(name, []).extend([value] * bool(equals))
        else:
            values.setdefault(name, []).append(word)
    return {name: shlex.join(words) for name, words in values.items()}


def without_flags(flags: list[str], names: set[str]) -> list[str]:
    """Return the flags without those of the settings `names`, each with its value."""
    kept_flags, skips = [], False
    for flag in flags:
        name, equals, _ = flag.partition("=")
        if name.removeprefix("--") in names and name.startswith("--"):
            skips = not equals
        elif not skips or flag.startswith("--"):
            kept_flags.append(flag)
            skips = False
        else:
            skips = False
    return kept_flags
