"""Start recipes under `accelerate launch`, for the subcommands that train."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

import yaml

from pretrain_lib.errors import BAD_INPUT, DONE, EXIT_CODE_FILE, RESUMABLE

FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class Stopped(Exception):  # noqa: N818 (no error)
    """A run was told to stop, and can be resumed."""


def read_settings(recipe: Path, flags: list[str]) -> dict[str, dict[str, Any]]:
    """Return the settings of a recipe with a user's flags, as `--print_config` prints them.

    Raises ValueError for flags that the recipe refuses.
    """
    command = [sys.executable, str(recipe), *flags, "--print_config"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise ValueError(_last_error(result.stderr))
    return yaml.safe_load(result.stdout)


def launch_into(console: Path, words: list[str]) -> None:
    """Run `accelerate launch`, what it prints added to a file.

    Raises Stopped for a run that was stopped, ValueError for one that failed.
    """
    console.parent.mkdir(parents=True, exist_ok=True)
    with console.open("a", encoding="utf-8") as file:
        code = launch(words, output=file)
    if code == RESUMABLE or code < 0:  # negative: the launcher was ended by a signal
        raise Stopped
    if code != DONE:
        reason = _last_error(console.read_text(encoding="utf-8", errors="replace"))
        raise ValueError(reason if code == BAD_INPUT else f"a run failed, see {console}: {reason}")


def _last_error(text: str) -> str:
    """Return the last line that begins with "error:", without these words, or the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["it printed nothing"]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines)[-1].removeprefix("error: ")


def launch(words: list[str], *, output: IO | None = None) -> int:
    """Run `accelerate launch`, handing on signals; return the exit code that the recipe wrote.

    `output` is the file that takes what it prints, by default the console.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", *words]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "code")
        env = os.environ | {EXIT_CODE_FILE: str(file)}
        process = subprocess.Popen(command, env=env, stdout=output, stderr=output)
        # A terminal sends Ctrl-C to all of its processes, and the run saves before it ends.
        handlers = {signal.SIGINT: signal.SIG_IGN}
        handlers |= dict.fromkeys(FORWARDED, lambda number, _: process.send_signal(number))
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return int(file.read_text(encoding="utf-8")) if file.is_file() else code
