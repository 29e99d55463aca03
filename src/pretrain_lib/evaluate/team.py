"""Scoring shared by all processes: one leads lm-eval, the others score what it deals out. Floor 7.

Each must hold the whole weights. lm-eval runs on the first alone, so that a task that fails there
fails once, and no process waits for another for ever.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from pretrain_lib.evaluate.live_model import evaluation_mode
from pretrain_lib.evaluate.scoring import Request, Score, Scorer, score_endings
from pretrain_lib.models.hf import Model


@contextmanager
def lead(accelerator: Accelerator, model: Model, *, batch_size: int) -> Iterator[Scorer]:
    """Give the first process a scorer that all take part in; the others have to `follow`."""

    def score(requests: Sequence[Request]) -> Iterator[tuple[int, Score]]:
        broadcast_object_list([list(requests)])
        yield from _score_together(accelerator, model, requests, batch_size)

    try:
        yield score
    finally:
        broadcast_object_list([None])


def follow(accelerator: Accelerator, model: Model, *, batch_size: int) -> None:
    """Score what the first process deals out, until it ends."""
    with evaluation_mode(model):
        while (requests := _receive()) is not None:
            _score_together(accelerator, model, requests, batch_size)


def _receive() -> list[Request] | None:
    message = [None]
    broadcast_object_list(message)
    return message[0]


def _score_together(
    accelerator: Accelerator, model: Model, requests: Sequence[Request], batch_size: int
) -> list[tuple[int, Score]]:
    """Score this process's share of requests; return all of them."""
    own = _share(requests, accelerator.process_index, accelerator.num_processes)
    with accelerator.autocast():
        found = score_endings(model, [requests[i] for i in own], batch_size=batch_size)
        scores = [(own[place], score) for place, score in found]
    return gather_object(scores)


def _share(requests: Sequence[Request], process: int, processes: int) -> list[int]:
    """Return the numbers of the requests of a process; endings stay with their context.

    The next longest context goes to the next process, so that each has as much to do.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, (context, _) in enumerate(requests):
        groups.setdefault(tuple(context), []).append(number)
    ordered = sorted(groups, key=len, reverse=True)
    return [number for context in ordered[process::processes] for number in groups[context]]
