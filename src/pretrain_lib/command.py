"""The frame around a recipe: its flags, its run folder, its exit code. Floor 6."""

import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from pretrain_lib.arguments import parse_recipe
from pretrain_lib.config import Recipe
from pretrain_lib.errors import BAD_INPUT, DONE, RESUMABLE, raised_here, report_errors
from pretrain_lib.plan import format_plan
from pretrain_lib.run_folder import is_main_rank, open_run_folder, read_status, write_status
from pretrain_lib.watch import STARTED


def run_recipe(
    main: Callable[[Recipe], str], defaults: Recipe, *, presets: dict[str, dict] | None = None
) -> None:
    """Run a recipe as a program: read its flags, hold its run folder, end with its exit code.

    `main` returns what `train` does. 0 done, 2 bad input, 75 stopped but resumable. Under elastic
    restarts, where any other code than 0 means "start again", the last two end with 0 as well;
    `status.json` says which it was.
    """
    os.environ.setdefault(STARTED, str(time.time()))
    try:
        code = report_errors(lambda: _run(main, defaults, presets))
    except SystemExit as end:  # --help, --print_config, or flags that could not be read
        code = int(end.code or DONE)
    elastic = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
    sys.exit(DONE if elastic and code in (BAD_INPUT, RESUMABLE) else code)


def _run(main: Callable[[Recipe], str], defaults: Recipe, presets: dict[str, dict] | None) -> int:
    config, plan_only = parse_recipe(defaults, presets=presets)
    if not plan_only:
        return _run_in_folder(main, config)
    print(format_plan(config))
    return DONE


def _run_in_folder(main: Callable[[Recipe], str], config: Recipe) -> int:
    folder, is_main = Path(config.run.dir), is_main_rank()
    with open_run_folder(folder, resume=config.run.resume) if is_main else nullcontext():
        try:
            config.check(processes=int(os.environ.get("WORLD_SIZE", 1)))
            return RESUMABLE if main(config) == "resumable" else DONE
        except BaseException as error:
            if is_main:
                step = read_status(folder).get("step")
                write_status(folder, _state_after(error), step=step, reason=_one_line(error))
            if isinstance(error, KeyboardInterrupt):
                return RESUMABLE
            raise


def _state_after(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "resumable"
    refused = isinstance(error, ValueError) and raised_here(error)
    return "refused" if refused else "failed"


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
