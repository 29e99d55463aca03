"""The command-line program around a recipe: flags, run folder, exit code."""

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
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
    DIVERGED,
    DONE,
    EXIT_CODE_FILE,
    FAILED,
    RESUMABLE,
    is_disk_full,
    raised_here,
    report_errors,
    tell_bug,
)
from pretrain_lib.evaluate.tasks import check_task_names
from pretrain_lib.files.console import open_console
from pretrain_lib.models.any_model import check_model
from pretrain_lib.plan.plan import format_plan
from pretrain_lib.ranks import is_main_rank
from pretrain_lib.run_folder.folder import (
    CHECKPOINTS,
    open_run_folder,
    write_recipe,
)
from pretrain_lib.run_folder.layout import check_run_folder, put_back, remember
from pretrain_lib.training.checkpoint_choice import check_resume
from pretrain_lib.training.early_stop import STARTED
from pretrain_lib.training.failures import (
    error_log,
    remark_on,
    state_after,
    write_last_status,
)
from pretrain_lib.training.first_weights import check_first_weights


def run_recipe(
    main: Callable[[Recipe], str], defaults: Recipe, *, presets: dict[str, dict] | None = None
) -> None:
    """Run a recipe as a program: parse flags, lock the run folder, and exit with the exit code.

    `main` returns the result of `train`. Exit codes: 0 done, 1 failed, 2 bad input, 3 diverged,
    75 stopped but resumable. An elastic launcher restarts the program after any nonzero code, so
    under one, bad input, divergence and resumable stops exit with 0 instead; `status.json` tells
    them apart.
    """
    open_console(lasting=True)
    os.environ.setdefault(STARTED, str(launch_time()))
    stop_with_launcher()
    try:
        run = partial(_run, main, defaults, presets)
        code = report_errors(run, user_errors=(ValueError, OSError))
    except SystemExit as end:  # --help, --print_config, or unreadable flags
        code = int(end.code or DONE)
    if (file := os.environ.get(EXIT_CODE_FILE)) is not None and is_main_rank():
        Path(file).write_text(str(code), encoding="utf-8")
    sys.exit(DONE if is_elastic() and code in (BAD_INPUT, DIVERGED, RESUMABLE) else code)


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
                write_last_status(folder, "refused", error)
        raise
    with open_run_folder(folder, resume=config.run.resume) if is_main else nullcontext():
        before = remember(folder)
        try:
            if is_main:
                write_recipe(folder, defaults)
            return RESUMABLE if main(config) == "resumable" else DONE
        except BaseException as error:
            state, remark = state_after(error), remark_on(error, folder)
            if remark is not None:
                print(f"error: {remark}", file=sys.stderr)
            # Under an elastic launcher, which is told 0, only the status tells a refusal.
            undone = is_main and state == "refused" and not is_elastic()
            if is_main and not (undone and put_back(folder, before)):
                write_last_status(folder, state, error)
            if state == "resumable":
                # By the time an elastic launcher restarts, there may be space on the disk again.
                return FAILED if is_elastic() and is_disk_full(error) else RESUMABLE
            if not isinstance(error, Exception) or state == "refused":
                raise
            if remark is None:
                tell_bug(error, error_log(folder))
            return DIVERGED if isinstance(error, FloatingPointError) else FAILED


def _check_data_elsewhere(config: Recipe) -> None:
    """Raise ValueError if the run folder is also that of its data."""
    paths = config.data.path if isinstance(config.data.path, list) else [config.data.path]
    for path in filter(None, paths):
        if Path(path).expanduser().resolve() == Path(config.run.dir).resolve():
            raise ValueError(
                f"run.dir={config.run.dir} and data.path={path} are the same folder, whose files "
                f"would replace one another; give the run a folder of its own"
            )


def _check(config: Recipe, *, is_main: bool) -> None:
    """Raise ValueError for bad settings, before the expensive work starts."""
    config.check(processes=int(os.environ.get("WORLD_SIZE", 1)))
    check_model(config.model, document_masking=config.data.document_masking)
    if is_main:
        check_run_folder(Path(config.run.dir))
        _check_data_elsewhere(config)
    check_trackers(config.log.trackers)
    check_resume(config)
    if not any((Path(config.run.dir) / CHECKPOINTS).glob("step-*")):
        check_first_weights(config)
        if is_main:
            check_task_names(config)
