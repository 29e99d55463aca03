"""The largest number of checkpoints that a run has on the disk at once."""

from pretrain_lib.config.settings import Recipe
from pretrain_lib.measures import VALIDATION_LOSS

SAVING = "being saved"


def most_checkpoints(config: Recipe) -> dict[str, int]:
    """Return how many checkpoints there can be at once, by what keeps them.

    Most there are while the last one is saved, if every validation or score was better than ever.
    """
    checkpoint, steps, best = config.checkpoint, _saved_steps(config), _best_steps(config)
    if not checkpoint.keep_last or len(steps) <= checkpoint.keep_last:
        return {"checkpoint.keep_last": len(steps)}
    older = steps[: -1 - checkpoint.keep_last]
    every = checkpoint.keep_every
    periodic = [step for step in older if every is not None and step % every == 0]
    counts = {
        "checkpoint.keep_last": checkpoint.keep_last,
        "checkpoint.keep_best": int(bool(set(older).intersection(best).difference(periodic))),
        "checkpoint.keep_every": len(periodic),
        SAVING: 1,
    }
    return {name: count for name, count in counts.items() if count}


def _best_steps(config: Recipe) -> range:
    """Return the steps at which a run may save because of `checkpoint.keep_best`."""
    name = config.checkpoint.keep_best
    if name is None:
        return range(0)
    every = config.validation.every if name == VALIDATION_LOSS else config.scores.every
    return range(every, config.whole_run(), every)


def _saved_steps(config: Recipe) -> list[int]:
    """Return the steps of the schedule after which a checkpoint may be saved, in order."""
    checkpoint, last = config.checkpoint, config.whole_run()
    steps = {last, *_best_steps(config)}
    if checkpoint.every is not None:
        steps.update(range(checkpoint.every, last, checkpoint.every))
    if checkpoint.every_tokens is not None:
        step = 0
        while (step := _next_by_tokens(config, step, checkpoint.every_tokens)) < last:
            steps.add(step)
    return sorted(steps)


def _next_by_tokens(config: Recipe, step: int, every: int) -> int:
    """Return the first step after `step` that reaches a multiple of `every` tokens."""
    sizes, length = config.batch_sizes(), config.batch.sequence_length
    multiple = (sizes.before(step) * length // every + 1) * every
    return sizes.steps_within((multiple - 1) // length) + 1
