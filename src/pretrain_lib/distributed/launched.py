"""Coordinate the processes started by `accelerate launch`: restarts, refusals, errors, signals."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch.distributed import distributed_c10d

PR_SET_PDEATHSIG = 1  # from linux/prctl.h
MODULES = ("accelerate.commands.launch", "accelerate.commands.accelerate_cli")
LAUNCHERS = ("accelerate", "accelerate-launch", "torchrun", "torch.distributed.run", *MODULES)
SET_BY_LAUNCHERS = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"}


def is_elastic() -> bool:
    """Return whether the launcher restarts all processes after an exit code other than 0."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


def launch_id(*, is_over: bool) -> str | None:
    """Return the rendezvous id that all nodes of an elastic launch share, None if it has none.

    One that is over has none: the next may be given the same. Only a Slurm job, which may be
    requeued, keeps its own.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if not is_elastic() or name == "none":
        return None
    return None if is_over and name != os.environ.get("SLURM_JOB_ID") else name


def is_restart(begun_by: str | None) -> bool:
    """Return whether the launcher has restarted these processes, and they continue the same run.

    A launcher counts only the restarts that its own node caused. On the other nodes the run is
    recognized by `begun_by`, the `launch_id` stored in its folder.
    """
    counted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    return counted or (begun_by is not None and begun_by == launch_id(is_over=False))


def launch_time() -> float:
    """Return when the launcher, or else this process, was started, in seconds since the epoch."""
    return (find_launcher() or psutil.Process()).create_time()


def find_launcher() -> psutil.Process | None:
    """Return the `accelerate launch` or `torchrun` process that started this one, or None."""
    parent = psutil.Process().parent()
    if parent is None or SET_BY_LAUNCHERS.isdisjoint(os.environ):
        return None
    try:  # a shell may have set those variables too, so look at the parent's command line
        words = parent.cmdline()
    except psutil.Error:  # the parent has ended, or belongs to another user
        return None
    return parent if any(Path(word).name in LAUNCHERS for word in words) else None


def refuse_together(reason: str) -> bool:
    """Make all processes of an elastic launch exit when the main process refuses to run.

    Returns whether the main process refuses, or True if no other process has to be told. The main
    process must exit with 0: any other code would restart it, and the other processes would keep
    waiting for its message, which they receive here or at startup (`meet_main_rank`).
    """
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    if not is_elastic() or alone or PartialState._shared_state:  # the process group exists already
        return True
    PartialState(cpu=not torch.cuda.is_available())
    outcome = [None, reason]
    broadcast_object_list(outcome)
    if outcome[1] is None:
        return False
    torch.distributed.barrier()  # no process may leave while another still receives
    torch.distributed.destroy_process_group()  # otherwise its threads may abort the exit
    return True


def meet_main_rank(accelerator: Accelerator) -> None:
    """Raise ValueError with the reason if the main process refused to run (`refuse_together`)."""
    try:
        on_main(accelerator, lambda: None)
    except ValueError:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        raise


def on_main(accelerator: Accelerator, function: Callable[[], Any]) -> Any:
    """Call `function` on the main process; return its result, or raise its ValueError, on all."""
    outcome = [None, None]
    if accelerator.is_main_process:
        try:
            outcome = [function(), None]
        except ValueError as error:
            outcome = [None, str(error)]
    broadcast_object_list(outcome)
    result, problem = outcome
    if problem is not None:
        raise ValueError(problem)
    return result


def on_all(function: Callable[[], Any]) -> Any:
    """Call `function` on all processes; a ValueError on one of them is raised on all."""
    result, problem = None, None
    try:
        result = function()
    except ValueError as error:
        problem = str(error)
    if problems := [text for text in gather_object([problem]) if text is not None]:
        raise ValueError(problems[0])
    return result


def limit_waits(seconds: float) -> None:
    """Set the timeout of all process groups: those of a device mesh are made with torch's own."""
    if distributed_c10d.is_initialized():
        for group in list(distributed_c10d._world.pg_map):
            distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def stop_with_launcher() -> None:
    """Make the kernel send SIGTERM (save and stop) to this process when its launcher exits.

    Accelerate's launcher of a single process hands on no signal: it exits and leaves the process
    running. Torch's, of several, leaves them if it gets a SIGUSR1 or is killed. Linux only; on
    other systems, signal the Python processes themselves.
    """
    if (launcher := find_launcher()) is not None:
        stop_with(launcher.pid)


def stop_with(parent: int) -> None:
    """Make the kernel send SIGTERM to this process when its parent exits, on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != parent:  # it had exited before the call
            os.kill(os.getpid(), signal.SIGTERM)
