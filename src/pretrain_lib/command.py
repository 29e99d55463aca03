"""What every command shares: errors in one line, exit codes, the frame around a recipe. Floor 6."""

import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from pretrain_lib.arguments import parse_recipe
from pretrain_lib.config import Recipe
from pretrain_lib.plan import format_plan
from pretrain_lib.run_folder import is_main_rank, open_run_folder, read_status, write_status
from pretrain_lib.watch import STARTED

DONE, BAD_INPUT, RESUMABLE = 0, 2, 75
OWN_CODE = Path(__file__).parent


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


def report_errors(
    action: Callable[[], int | None], *, user_errors: tuple[type[Exception], ...] = (ValueError,)
) -> int:
    """Call `action` and return its exit code; a user's mistake is printed in one line, with 2.

    A ValueError raised by other code than this library's is a defect and keeps its traceback.
    """
    try:
        return action() or DONE
    except user_errors as error:
        defect = isinstance(error, ValueError) and not _raised_here(error)
        if defect or isinstance(error, BrokenPipeError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


def _raised_here(error: ValueError) -> bool:
    origin = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return OWN_CODE in origin.parents


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
    refused = isinstance(error, ValueError) and _raised_here(error)
    return "refused" if refused else "failed"


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
