"""Run tasks in worker processes, with a progress bar."""

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
from typing import Any

from tqdm import tqdm

from pretrain_lib.errors import raised_here
from pretrain_lib.wording import plural

# How often the bar is redrawn on a terminal, and a progress line is printed elsewhere.
REFRESH_SECONDS, LINE_SECONDS = 0.3, 30
# Workers are forked from a fork server: a fork of this process would inherit locks held by threads.
CONTEXT = get_context("forkserver")
SAFE_PATH = "PYTHONSAFEPATH"
_counters: Any = None  # shared with workers: source bytes, text bytes, documents, tokens


def count_cores() -> int:
    """Return the number of CPU cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def warm_up(function: Callable) -> None:
    """Start the fork server early, to import the module of `function` in the background."""
    CONTEXT.set_forkserver_preload([function.__module__])
    with safe_imports():
        forkserver.ensure_running()


@contextmanager
def safe_imports() -> Iterator[None]:
    """Have the servers that multiprocessing starts import nothing from the working directory.

    They are started with `python -c`, which would take a user's own socket.py there for Python's.
    """
    before = os.environ.get(SAFE_PATH)
    os.environ[SAFE_PATH] = "1"
    try:
        yield
    finally:
        os.environ.pop(SAFE_PATH) if before is None else os.environ.update({SAFE_PATH: before})


def run_tasks(
    function: Callable,
    tasks: Iterable,
    *,
    workers: int,
    ahead: int | None = None,
    survive_signals: bool = False,
) -> Iterator:
    """Yield `function(task)` for each task, in order, computed by `workers` processes.

    With `workers=1` the tasks run in this process. At most `ahead` tasks are submitted before the
    result of the first pending one is consumed (default: all). Workers exit with this process, even
    if it is killed. They also exit on SIGINT, SIGTERM and SIGUSR1 unless `survive_signals` is set.

    Raises RuntimeError if a worker process dies.
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
    earlier, pending, ended = set(active_children()), deque(), False
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
            f"one of {workers} worker processes ended unexpectedly. If it ran out of memory, start "
            f"again with fewer workers; a script that starts workers needs the guard "
            f"`if __name__ == '__main__':`"
        ) from error
    finally:
        for worker in () if ended else set(active_children()) - earlier:
            worker.kill()  # its result is no longer needed
        pool.shutdown(cancel_futures=True)


@dataclass
class _Refusal:
    """A ValueError raised by this library in a worker, to be raised again in the parent.

    A pickled exception has no traceback, which tells a user's mistake from a defect, so the message
    is sent instead.
    """

    message: str


def _run_task(function: Callable, task: Any) -> Any:
    try:
        return function(task)
    except ValueError as error:
        if not raised_here(error):
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
    if survive_signals:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    end_with_parent()


def end_with_parent() -> None:
    """Exit this process as soon as its parent has exited, even if the parent was killed."""

    def wait() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def count(
    *, source_bytes: int = 0, text_bytes: int = 0, documents: int = 0, tokens: int = 0
) -> None:
    """Add to the totals of the progress bar, from any process."""
    if _counters is not None:
        with _counters.get_lock():
            for index, amount in enumerate((source_bytes, text_bytes, documents, tokens)):
                _counters[index] += amount


@contextmanager
def show_progress(label: str, *, total_bytes: int, done_bytes: int = 0, quiet: bool) -> Iterator:
    """Show the progress reported through `count` on stderr while the context is open.

    Shows documents, tokens, MB/s of text and the time left: as a bar on a terminal, as a line every
    `LINE_SECONDS` elsewhere.
    """
    global _counters  # handed to the workers when they start
    with safe_imports():
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
            # Read without the lock: a worker may have been killed while holding it.
            done, text_bytes, documents, tokens = _counters.get_obj()[:]
            rate = text_bytes / (now - started)
            counts = f"{plural(documents, 'document')}, {plural(tokens, 'token')}"
            numbers = f"{counts}, {rate / 1e6:.1f} MB/s of text"
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
