"""Scoring shared by all processes: one leads lm-eval, the others do what it deals out.

Each must hold the whole weights. lm-eval runs on the first alone, so that a task that fails there
fails once, and no process waits for another for ever.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from pretrain_lib.evaluate.live_model import Deal, LiveModel, Outcomes
from pretrain_lib.evaluate.prefix_trees import grow_trees


@contextmanager
def lead(accelerator: Accelerator) -> Iterator[Deal]:
    """Give the first process what deals work to all of them; the others have to `follow`.

    What a piece of work comes to is known when all have done their share.
    """
    listening = True

    def deal(live: LiveModel, work: str, items: Sequence) -> Outcomes:
        nonlocal listening
        broadcast_object_list([(work, list(items))])
        listening = False  # until all have told that they could do it
        outcomes = _do_together(accelerator, live, work, items)
        listening = True
        yield from outcomes

    try:
        yield deal
    finally:
        if listening:
            broadcast_object_list([None])


def follow(accelerator: Accelerator, live: LiveModel) -> None:
    """Do what the first process deals out, until it ends."""
    while (message := _receive()) is not None:
        _do_together(accelerator, live, *message)


def _receive() -> tuple[str, Sequence] | None:
    message = [None]
    broadcast_object_list(message)
    return message[0]


def _do_together(
    accelerator: Accelerator, live: LiveModel, work: str, items: Sequence
) -> list[tuple[int, object]]:
    """Do this process's share of some work; return what became of all items.

    Raises what it met itself, and if another has met something, so that none waits for one that has
    gone.
    """
    outcomes, problem = [], None
    try:
        own = share(live, work, items, accelerator.process_index, accelerator.num_processes)
        with accelerator.autocast():
            done = live.do(work, [items[i] for i in own])
            outcomes = [(own[place], outcome) for place, outcome in done]
    except Exception as error:  # met by one: the others must hear of it, or they would wait
        problem = error
    told = gather_object([(outcomes, None if problem is None else repr(problem))])
    if problem is not None:
        raise problem
    texts = [text for _, text in told if text is not None]
    if texts:
        raise RuntimeError(f"another process could not do its share: {texts[0]}")
    return [outcome for outcomes, _ in told for outcome in outcomes]


def share(
    live: LiveModel, work: str, items: Sequence, process: int, processes: int
) -> Sequence[int]:
    """Return the numbers of the items of a process; what begins alike is scored by one.

    The next largest goes to the next process, so that each has as much to do.
    """
    if work == "write":
        return range(process, len(items), processes)
    own = grow_trees(items, live.model.config)[process::processes]
    return [number for tree in own for number, _ in tree.endings]
