"""Start recipes under `accelerate launch`, for the subcommands that train."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, Any

import psutil
import yaml

from pretrain_lib.errors import BAD_INPUT, DONE, EXIT_CODE_FILE, RESUMABLE, heard_signals


class Stopped(Exception):  # noqa: N818 (no error)
    """A command was told to stop by a signal; started again, it goes on."""


class RunError(ValueError):
    """A run ended before it was done, and was not told to; what it printed says more."""


def read_settings(recipe: Path, flags: list[str]) -> dict[str, dict[str, Any]]:
    """Return the settings of a recipe with a user's flags, as `--print_config` prints them.

    Raises ValueError for flags that the recipe refuses.
    """
    command = [sys.executable, str(recipe), *flags, "--print_config"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise ValueError(_last_error(result.stderr))
    return yaml.safe_load(result.stdout)


def launch_into(console: Path, words: list[str], run: Path) -> bool:
    """Run `accelerate launch` into the folder `run`, what it prints added to a file.

    A run that has begun there goes on, whatever the user's `run.resume` says of another folder.
    Returns whether it is done; if it is not, its `run.max_time` is used up. Raises Stopped after a
    signal, even if the run was done by then, ValueError for a run that was refused, RunError for
    one that ended in another way before it was done, as on a full disk.
    """
    from pretrain_lib.run_folder.status import read_status  # imports torch, which is slow

    console.parent.mkdir(parents=True, exist_ok=True)
    with console.open("a", encoding="utf-8") as file:
        flags = ["--run.resume", "auto", "--run.dir", str(run)]
        code, signalled = launch([*words, *flags], output=file)
    reason = read_status(run).get("reason", "") if code == RESUMABLE else ""
    # Negative: the launcher was ended by a signal.
    if code < 0 or (signalled and code in (DONE, RESUMABLE)) or reason.startswith("signal "):
        raise Stopped
    if code == DONE or reason.startswith("run.max_time="):
        return code == DONE
    reason = reason or _last_error(console.read_text(encoding="utf-8", errors="replace"))
    if code == BAD_INPUT:
        raise ValueError(reason)
    how = "stopped" if code == RESUMABLE else "failed"
    raise RunError(f"a run {how}, see {console}: {reason}")


def _last_error(text: str) -> str:
    """Return the last line that begins with "error:", without these words, or the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["it printed nothing"]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines)[-1].removeprefix("error: ")


@contextmanager
def on_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Have signals that stop a run handled by `handler` meanwhile."""
    before = {number: signal.signal(number, handler) for number in heard_signals()}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def stop(*_: Any) -> None:
    """Handle a signal where nothing has to be saved."""
    raise Stopped


def launch(words: list[str], *, output: IO | None = None) -> tuple[int, bool]:
    """Run `accelerate launch`, handing on signals.

    Returns the exit code that the recipe wrote, and whether there was a signal to hand on. A run
    that is told to stop before it could write one can be started again: it is `RESUMABLE`. `output`
    is the file that takes what it prints, by default the console. If this process is killed, the
    run is told to stop, too.
    """
    from pretrain_lib.distributed.launched import stop_with  # imports torch, which is slow

    # -P: without modules from the working directory; recipes have those of their own folder.
    command = [sys.executable, "-P", "-m", "accelerate.commands.launch", *words]
    recipes: set[psutil.Process] = set()  # that were told to stop
    launchers: list[subprocess.Popen] = []
    signals: list[int] = []

    def hand_on(number: int, _: FrameType | None) -> None:
        signals.append(number)
        for launcher in launchers:
            recipes.update(_recipes_of(launcher, words))
        # A terminal sends Ctrl-C to all processes: a second one would stop the run without a save.
        sent = signal.SIGTERM if number == signal.SIGINT else number
        for target in recipes or launchers:
            with suppress(psutil.Error):
                target.send_signal(sent)

    with tempfile.TemporaryDirectory() as folder, on_signals(hand_on):
        file = Path(folder, "code")
        process = subprocess.Popen(
            command,
            env=os.environ | {EXIT_CODE_FILE: str(file)},
            stdout=output,
            stderr=output,
            preexec_fn=partial(stop_with, os.getpid()),
        )
        launchers.append(process)
        if signals:  # while it was being started
            process.terminate()
        code = process.wait()
        psutil.wait_procs(recipes)  # Ctrl-C ends a launcher at once, and the run saves first
        if file.is_file():
            return int(file.read_text(encoding="utf-8")), bool(signals)
        return RESUMABLE if signals else code, bool(signals)


def _recipes_of(launcher: subprocess.Popen, words: list[str]) -> list[psutil.Process]:
    """Return the processes of a recipe that its launcher has started.

    A signal has to go to them: a launcher of one process would leave it behind, and one of several
    knows SIGTERM alone, and grants 30 seconds.
    """
    with suppress(psutil.Error):  # one that has ended
        children = psutil.Process(launcher.pid).children()
        return [child for child in children if child.cmdline()[-1:] == words[-1:]]
    return []
