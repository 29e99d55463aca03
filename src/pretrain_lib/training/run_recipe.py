"""The command-line program around a recipe: flags, run folder, exit code."""

import errno
import os
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from pretrain_lib.config.arguments import parse_recipe
from pretrain_lib.config.settings import Recipe
from pretrain_lib.distributed.guards import check_launch, check_trackers
from pretrain_lib.distributed.launched import (
    is_elastic,
    launch_time,
    refuse_together,
    stop_with_launcher,
)
from pretrain_lib.errors import (
    BAD_INPUT,
    DONE,
    EXIT_CODE_FILE,
    RESUMABLE,
    LocalFault,
    raised_here,
    report_errors,
)
from pretrain_lib.evaluate.tasks import check_task_names
from pretrain_lib.plan.plan import format_plan
from pretrain_lib.ranks import is_main_rank
from pretrain_lib.run_folder.folder import (
    CHECKPOINTS,
    open_run_folder,
    read_status,
    write_recipe,
    write_status,
)
from pretrain_lib.training.first_weights import check_first_weights
from pretrain_lib.training.resume import check_resume
from pretrain_lib.training.watch import STARTED

FAILED = 1
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Matches the messages of gloo, NCCL and torch's store about a lost or unresponsive process.
PEER_LOST = re.compile(r"(?i)timed? ?out|connection (closed|reset|refused)|peer")


def run_recipe(
    main: Callable[[Recipe], str], defaults: Recipe, *, presets: dict[str, dict] | None = None
) -> None:
    """Run a recipe as a program: parse flags, lock the run folder, and exit with the exit code.

    `main` returns the result of `train`. Exit codes: 0 done, 2 bad input, 75 stopped but resumable.
    An elastic launcher restarts the program after any nonzero code, so under one, bad input and
    requested stops exit with 0 too; `status.json` tells them apart.
    """
    os.environ.setdefault(STARTED, str(launch_time()))
    stop_with_launcher()
    try:
        code = report_errors(lambda: _run(main, defaults, presets))
    except SystemExit as end:  # --help, --print_config, or unreadable flags
        code = int(end.code or DONE)
    if (file := os.environ.get(EXIT_CODE_FILE)) is not None and is_main_rank():
        Path(file).write_text(str(code))
    sys.exit(DONE if is_elastic() and code in (BAD_INPUT, RESUMABLE) else code)


def _run(main: Callable[[Recipe], str], defaults: Recipe, presets: dict[str, dict] | None) -> int:
    check_launch()
    config, planned = parse_recipe(defaults, presets=presets)
    if planned:
        print(format_plan(config, planned))
        return DONE
    try:
        return _run_in_folder(main, config, defaults)
    except ValueError as error:
        if raised_here(error) and not refuse_together(str(error)):
            print(f"error: {error}", file=sys.stderr)
            return FAILED  # on this process only: the launcher stops the others
        raise


def _run_in_folder(main: Callable[[Recipe], str], config: Recipe, defaults: Recipe) -> int:
    folder, is_main = Path(config.run.dir), is_main_rank()
    try:
        _check(config, is_main=is_main)
    except ValueError as error:
        if is_elastic() and is_main and raised_here(error):  # the exit code will be 0, so record it
            with open_run_folder(folder, resume=config.run.resume):
                _write_last_status(folder, "refused", error)
        raise
    with open_run_folder(folder, resume=config.run.resume) if is_main else nullcontext():
        try:
            if is_main:
                write_recipe(folder, defaults)
            return RESUMABLE if main(config) == "resumable" else DONE
        except BaseException as error:
            state, remark = _state_after(error), _remark_on(error)
            if remark is not None:
                print(f"error: {remark}", file=sys.stderr)
            if is_main:
                _write_last_status(folder, state, error)
            if state == "resumable":
                # By the time an elastic launcher restarts, there may be space on the disk again.
                return FAILED if is_elastic() and _disk_is_full(error) else RESUMABLE
            if isinstance(error, LocalFault):
                return FAILED if is_elastic() else BAD_INPUT
            raise


def _check(config: Recipe, *, is_main: bool) -> None:
    """Raise ValueError for bad settings, before the expensive work starts."""
    config.check(processes=int(os.environ.get("WORLD_SIZE", 1)))
    check_trackers(config.log.trackers)
    check_resume(config)
    if not any((Path(config.run.dir) / CHECKPOINTS).glob("step-*")):
        check_first_weights(config)
        if is_main:
            check_task_names(config)


def _state_after(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt) or _disk_is_full(error):
        return "resumable"
    refused = isinstance(error, ValueError) and raised_here(error)
    return "refused" if refused else "failed"


def _disk_is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in DISK_FULL


def _remark_on(error: BaseException) -> str | None:
    """Return the message for an environmental error, such as a full disk or a lost process."""
    if isinstance(error, LocalFault):
        return str(error)
    if _disk_is_full(error):
        return f"{error}: make room and start again, the run goes on from its newest checkpoint"
    if isinstance(error, RuntimeError) and PEER_LOST.search(str(error)):
        return (
            f"process {os.environ.get('RANK', 0)} lost another one, or waited for it longer than "
            f"system.collective_timeout: what that one printed tells why. Started again, the run "
            f"goes on from its newest checkpoint"
        )
    return None


def _write_last_status(folder: Path, state: str, error: BaseException) -> None:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    try:
        write_status(folder, state, step=read_status(folder).get("step"), reason=reason)
    except OSError as problem:
        print(f"error: status.json could not be written either: {problem}", file=sys.stderr)
