"""Work shared out to processes, and the bar that shows how far it has come."""

import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import active_children, forkserver, get_context, parent_process
from pathlib import Path
from traceback import extract_tb
from typing import Any

from tqdm import tqdm

REFRESH_SECONDS, LINE_SECONDS = 0.3, 30  # of a bar on a terminal; between lines elsewhere
# Started once and forked from: a fork of this process would inherit locks that threads hold.
CONTEXT = get_context("forkserver")
OWN_CODE = Path(__file__).parents[1]
_counters: Any = None  # shared with workers: bytes of source and of text, documents, tokens


def count_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def warm_up(function: Callable) -> None:
    """Start what workers are forked from, which imports meanwhile what `function` needs."""
    CONTEXT.set_forkserver_preload([function.__module__])
    forkserver.ensure_running()


def run_tasks(
    function: Callable,
    tasks: Iterable,
    *,
    workers: int,
    ahead: int | None = None,
    survive_signals: bool = False,
) -> Iterator:
    """Yield `function(task)` for each task in order, worked on by so many processes.

    One worker is this process itself. At most `ahead` tasks are begun before their turn (default:
    all). Workers end with this process, even if it is killed, and at the signals that end programs,
    unless they are to `survive_signals`.
    """
    if workers == 1:
        yield from map(function, tasks)
        return
    warm_up(function)
    pool = ProcessPoolExecutor(
        workers,
        mp_context=CONTEXT,
        initializer=_start_worker,
        initargs=(_counters, survive_signals),
    )
    others, pending, ended = set(active_children()), deque(), False
    try:
        for task in tasks:
            pending.append(pool.submit(_run_task, function, task))
            if ahead is not None and len(pending) > ahead:
                yield _take_result(pending.popleft())
        while pending:
            yield _take_result(pending.popleft())
        ended = True
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"one of {workers} worker processes ended. If it was killed for want of memory, start "
            f"again with fewer workers; a script that starts workers needs the guard "
            f"`if __name__ == '__main__':`"
        ) from error
    finally:
        for worker in () if ended else set(active_children()) - others:
            worker.kill()  # what it is at is not wanted any more
        pool.shutdown(cancel_futures=True)


@dataclass
class _Refusal:
    """A ValueError that this library raised in a worker: its traceback does not travel."""

    message: str


def _run_task(function: Callable, task: Any) -> Any:
    try:
        return function(task)
    except ValueError as error:
        if OWN_CODE not in Path(extract_tb(error.__traceback__)[-1].filename).parents:
            raise  # a defect, not the user's mistake
        return _Refusal(str(error))


def _take_result(future: Future) -> Any:
    result = future.result()
    if isinstance(result, _Refusal):
        raise ValueError(result.message)
    return result


def _start_worker(counters: Any, survive_signals: bool) -> None:
    global _counters  # the worker's own, for `count`
    _counters = counters
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN if survive_signals else signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    end_with_parent()


def end_with_parent() -> None:
    """End this process as soon as its parent is gone, even if that was killed."""

    def wait() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def count(
    *, source_bytes: int = 0, text_bytes: int = 0, documents: int = 0, tokens: int = 0
) -> None:
    """Add to what the bar shows, from whichever process."""
    if _counters is not None:
        with _counters.get_lock():
            for index, amount in enumerate((source_bytes, text_bytes, documents, tokens)):
                _counters[index] += amount


@contextmanager
def show_progress(label: str, *, total_bytes: int, done_bytes: int = 0, quiet: bool) -> Iterator:
    """Show documents, tokens, MB/s and the time left of what calls `count` meanwhile, on stderr.

    A bar on a terminal, elsewhere a line now and then.
    """
    global _counters  # handed to the workers when they start
    _counters = CONTEXT.Array("Q", 4)
    ended = threading.Event()
    terminal = sys.stderr.isatty()
    bar = tqdm(
        desc=label,
        total=max(total_bytes, 1),
        initial=done_bytes,
        bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        disable=quiet or not terminal,
    )

    def refresh() -> None:
        started = said = time.monotonic()
        is_last = False
        while not is_last:
            is_last = ended.wait(REFRESH_SECONDS)
            now = time.monotonic()
            # Not locked: a worker that was killed may have held the lock.
            done, text_bytes, documents, tokens = _counters.get_obj()[:]
            rate = text_bytes / (now - started)
            numbers = f"{documents:,} documents, {tokens:,} tokens, {rate / 1e6:.1f} MB/s of text"
            bar.n = min(done_bytes + done, bar.total or 0)
            bar.set_postfix_str(numbers)
            if not (quiet or terminal) and now - said > LINE_SECONDS and done:
                left = (total_bytes - done_bytes - done) * (now - started) / done
                share = (done_bytes + done) / max(total_bytes, 1)
                print(f"{label}: {share:.0%}, {numbers}, {left:.0f} s left", file=sys.stderr)
                said = now

    watcher = threading.Thread(target=refresh, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        bar.close()
        _counters = None
