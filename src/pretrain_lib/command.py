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
    main: Callable[[Recipe], None], defaults: Recipe, *, presets: dict[str, dict] | None = None
) -> None:
    """Run a recipe as a program: read its flags, hold its run folder, end with its exit code.

    0 done, 2 bad input, 75 stopped but resumable. Under elastic restarts, where any other code than
    0 means "start again", the last two end with 0 as well; `status.json` says which it was.
    """
    os.environ.setdefault(STARTED, str(time.time()))
    config, plan_only = parse_recipe(defaults, presets=presets)
    if plan_only:
        sys.exit(report_errors(lambda: print(format_plan(config))))
    code = report_errors(lambda: _run_in_folder(main, config))
    elastic = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
    sys.exit(DONE if elastic and code in (BAD_INPUT, RESUMABLE) else code)


def report_errors(action: Callable[[], int | None]) -> int:
    """Call `action` and return its exit code; a user's mistake is printed in one line, with 2.

    A ValueError raised by other code than this library's is a defect and keeps its traceback.
    """
    try:
        return action() or DONE
    except ValueError as error:
        if not _raised_here(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


def _raised_here(error: ValueError) -> bool:
    origin = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return OWN_CODE in origin.parents or origin.suffix == ""


def _run_in_folder(main: Callable[[Recipe], None], config: Recipe) -> int:
    config.check(processes=int(os.environ.get("WORLD_SIZE", 1)))
    folder, is_main = Path(config.run.dir), is_main_rank()
    with open_run_folder(folder, resume=config.run.resume) if is_main else nullcontext():
        try:
            main(config)
        except BaseException as error:
            if is_main:
                step = read_status(folder).get("step")
                write_status(folder, _state_after(error), step=step, reason=_one_line(error))
            if isinstance(error, KeyboardInterrupt):
                return RESUMABLE
            raise
        # Every rank reads what the main one wrote; none gets here before it has.
        return RESUMABLE if read_status(folder).get("state") == "resumable" else DONE


def _state_after(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "resumable"
    refused = isinstance(error, ValueError) and _raised_here(error)
    return "refused" if refused else "failed"


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
