"""Check constraints between the settings of a run.

`config` is a `settings.Recipe` in all functions.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from pretrain_lib.config.renamed import now_called
from pretrain_lib.measures import VALIDATION_LOSS, check_measure
from pretrain_lib.optim.arguments import check_moments, check_rates
from pretrain_lib.values import as_written, did_you_mean, show
from pretrain_lib.wording import plural

DATA = "data"  # in `run.allow_changes`, allows a run to resume with other data


def check_together(config: Any) -> None:
    """Raise ValueError for settings that contradict one another."""
    names = ("matrix_learning_rate", "embedding_learning_rate")
    rates = {name: getattr(config.optimizer, name) for name in names}
    try:
        check_moments(config.optimizer.moments, config.optimizer.betas)
        check_rates(config.optimizer.learning_rate, **rates)
    except ValueError as error:
        raise ValueError(f"optimizer.{error}") from None
    schedule = config.schedule
    if (schedule.tokens is None) == (schedule.epochs is None):
        raise ValueError(
            f"schedule.tokens={as_written(schedule.tokens)} and "
            f"schedule.epochs={as_written(schedule.epochs)}: one of the two must be set, the other "
            f"null"
        )
    if schedule.warmup_tokens is None and schedule.warmup_fraction is None:
        raise ValueError(
            "schedule.warmup_tokens and schedule.warmup_fraction are both null: set one (0 is no "
            "warm-up)"
        )
    if schedule.epochs is not None and config.data.streaming:
        raise ValueError(
            f"schedule.epochs={schedule.epochs}: the length of a stream is not known before it has "
            f"been read (data.streaming=true); set schedule.tokens instead"
        )
    if config.system.profile is not None and config.system.profile[0] > config.system.profile[1]:
        raise ValueError(
            f"system.profile={list(config.system.profile)}: the first step must not come after the "
            f"last"
        )
    if config.batch.sequence_length > config.model.context_length:
        raise ValueError(
            f"batch.sequence_length={config.batch.sequence_length} is longer than "
            f"model.context_length={config.model.context_length}; shorten the one or raise the "
            f"other"
        )
    if "://" in config.run.dir:
        raise ValueError(
            f"run.dir={config.run.dir} must be a local path; copy the folder to a URL yourself"
        )
    check_best(config)


def check_best(config: Any) -> None:
    """Raise ValueError if `checkpoint.keep_best` names nothing that the run measures."""
    name = config.checkpoint.keep_best
    check_measure(name, "checkpoint.keep_best")
    if name not in (None, VALIDATION_LOSS) and not config.scores.tasks:
        raise ValueError(
            f"checkpoint.keep_best={name} is a score, but there are no scores.tasks: name its task "
            f"there, or keep the lowest {VALIDATION_LOSS}"
        )


def check_changes(config: Any) -> None:
    """Raise ValueError for an unknown name in `run.allow_changes`."""
    settings = {DATA, *dict(dotted(dataclasses.asdict(config)))}
    for name in config.run.allow_changes:
        if name not in settings:
            hint = now_called(name) or f"is no setting{did_you_mean(name, settings)}"
            raise ValueError(f"run.allow_changes={show(config.run.allow_changes)}: {name} {hint}")


def dotted(settings: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of each setting, a dict before what is in it."""
    for key, value in settings.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from dotted(value, f"{prefix}{key}.")


def check_division(config: Any, *, processes: int) -> None:
    """Raise ValueError if a step does not divide into whole micro-batches for all processes."""
    unit = processes * config.batch.micro_batch * config.batch.sequence_length
    text = (
        f"{plural(processes, 'process', 'processes')} x "
        f"{plural(config.batch.micro_batch, 'sequence')} x "
        f"{plural(config.batch.sequence_length, 'token')} = {unit}"
    )
    for name in ("tokens", "ramp_from", "ramp_increment"):
        tokens = getattr(config.batch, name)
        if tokens is not None and (tokens % unit or tokens <= 0):
            raise does_not_divide(name, tokens, text, unit)


def does_not_divide(name: str, tokens: int, unit_text: str, unit: int) -> ValueError:
    """Return the error for a `batch` setting whose tokens are not a multiple of `unit`."""
    nearest = max(1, round(tokens / unit)) * unit
    return ValueError(
        f"batch.{name}={tokens} must be a multiple of {unit_text}; nearest: {nearest}"
    )
