"""Distribute lm-eval over processes: rank 0 runs it and deals out requests to all ranks.

Every process must hold the whole weights. lm-eval runs only on rank 0, so a failing task fails
once, and no process is left waiting for another.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from pretrain_lib.evaluate.live_model import Deal, LiveModel, Outcomes
from pretrain_lib.evaluate.prefix_trees import grow_trees


@contextmanager
def lead(accelerator: Accelerator) -> Iterator[Deal]:
    """Return, on rank 0, the function that deals out work; the other ranks must call `follow`.

    The outcomes of a piece of work are available once all ranks have done their share.
    """
    listening = True

    def deal(live: LiveModel, work: str, items: Sequence) -> Outcomes:
        nonlocal listening
        broadcast_object_list([(work, list(items))])
        listening = False  # until all ranks have reported success
        outcomes = _do_together(accelerator, live, work, items)
        listening = True
        yield from outcomes

    try:
        yield deal
    finally:
        if listening:
            broadcast_object_list([None])


def follow(accelerator: Accelerator, live: LiveModel) -> None:
    """Do the work that rank 0 deals out, until it has finished."""
    while (message := _receive()) is not None:
        _do_together(accelerator, live, *message)


def _receive() -> tuple[str, Sequence] | None:
    message = [None]
    broadcast_object_list(message)
    return message[0]


def _do_together(
    accelerator: Accelerator, live: LiveModel, work: str, items: Sequence
) -> list[tuple[int, object]]:
    """Do this process's share of some work; return the outcomes of all items.

    Raises the error of this process, or RuntimeError with that of another process, so that no
    process waits for one that has failed.
    """
    outcomes, problem = [], None
    try:
        numbers = share(live, work, items, accelerator.process_index, accelerator.num_processes)
        with accelerator.autocast():
            done = live.do(work, [items[i] for i in numbers])
            outcomes = [(numbers[place], outcome) for place, outcome in done]
    except Exception as error:  # reported to the other processes, which would wait otherwise
        problem = error
    answers = gather_object([(outcomes, None if problem is None else repr(problem))])
    if problem is not None:
        raise problem
    texts = [text for _, text in answers if text is not None]
    if texts:
        raise RuntimeError(f"another process failed in its share of the evaluation: {texts[0]}")
    return [outcome for outcomes, _ in answers for outcome in outcomes]


def share(
    live: LiveModel, work: str, items: Sequence, process: int, processes: int
) -> Sequence[int]:
    """Return the indices of the items of one process.

    Requests with a common prefix are scored by the same process. Prefix trees are dealt round-robin
    in order of size, to balance the load.
    """
    if work == "write":
        return range(process, len(items), processes)
    trees = grow_trees(items, live.model.config)[process::processes]
    return [number for tree in trees for number, _ in tree.endings]
