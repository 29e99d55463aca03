"""Scoring shared by all processes: one leads lm-eval, the others score what it deals out. Floor 7.

Each must hold the whole weights. lm-eval runs on the first alone, so that a task that fails there
fails once, and no process waits for another for ever.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from pretrain_lib.evaluate.live_model import evaluation_mode
from pretrain_lib.evaluate.prefix_trees import Request, grow_trees
from pretrain_lib.evaluate.scoring import Score, Scorer, score_endings
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
    """Score this process's share of requests; return the scores of all.

    Raises what it met itself; the first process also raises if another has met something.
    """
    process, processes = accelerator.process_index, accelerator.num_processes
    own = _share(requests, model.config, process, processes)
    scores, problem = [], None
    try:
        with accelerator.autocast():
            found = score_endings(model, [requests[i] for i in own], batch_size=batch_size)
            scores = [(own[place], score) for place, score in found]
    except Exception as error:  # met by one: the others must hear of it, or they would wait
        problem = error
    outcomes = gather_object([(scores, None if problem is None else repr(problem))])
    told = [text for _, text in outcomes if text is not None]
    if problem is not None:
        raise problem
    if told and accelerator.is_main_process:
        raise RuntimeError(f"another process could not score its share: {told[0]}")
    return [score for scores, _ in outcomes for score in scores]


def _share(requests: Sequence[Request], config: Any, process: int, processes: int) -> list[int]:
    """Return the numbers of the requests of a process; what begins alike stays together.

    The next largest tree goes to the next process, so that each has as much to do.
    """
    own = grow_trees(requests, config)[process::processes]
    return [number for tree in own for number, _ in tree.endings]
