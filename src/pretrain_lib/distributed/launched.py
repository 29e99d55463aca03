"""What a process that `accelerate launch` started owes to those beside it."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object

PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def is_elastic() -> bool:
    """Whether any exit code but 0 makes the launcher start all processes again."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


def launch_id() -> str | None:
    """Return by which name the launchers of all nodes know an elastic launch, if it has one."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return name if is_elastic() and name != "none" else None


def is_restart(begun_by: str | None) -> bool:
    """Whether the launcher has started these processes again, and this is the run it was.

    A launcher counts the restarts for which its own node is to blame. On the others the run is
    known by `begun_by`, the `launch_id` that its folder holds.
    """
    counted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    return counted or (begun_by is not None and begun_by == launch_id())


def launch_time() -> float:
    """Return when the command was given that started this process, in seconds since the epoch."""
    return (find_launcher() or psutil.Process()).create_time()


def find_launcher() -> psutil.Process | None:
    """Return the process of `accelerate launch` that started this one, if one did."""
    parent = psutil.Process().parent()
    if parent is None or "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return None  # a shell may have set that variable, too
    try:
        words = parent.cmdline()
    except psutil.Error:  # it has ended, or is another user's
        return None
    return parent if any("accelerate" in Path(word).name for word in words) else None


def refuse_together(reason: str) -> bool:
    """Let the processes of an elastic launch end together; return whether the main one refuses.

    It ends with 0, lest it be started again, upon which nobody would end the others: they wait for
    its message, here or when they start (`meet_main_rank`). True where nobody has to be told.
    """
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    if not is_elastic() or alone or PartialState._shared_state:  # they have met
        return True
    PartialState(cpu=not torch.cuda.is_available())
    outcome = [None, reason]
    broadcast_object_list(outcome)
    if outcome[1] is None:
        return False
    torch.distributed.barrier()  # nobody leaves while another still listens
    torch.distributed.destroy_process_group()  # or its threads may abort the exit
    return True


def meet_main_rank(accelerator: Accelerator) -> None:
    """Raise ValueError with its reason if the main process has refused (`refuse_together`)."""
    try:
        on_main(accelerator, lambda: None)
    except ValueError:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        raise


def on_main(accelerator: Accelerator, function: Callable[[], Any]) -> Any:
    """Call `function` on the main process; all processes get its result, or its ValueError."""
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


def on_all(accelerator: Accelerator, function: Callable[[], Any]) -> Any:
    """Call `function` on all processes; a ValueError of one is raised on all of them."""
    result, problem = None, None
    try:
        result = function()
    except ValueError as error:
        problem = str(error)
    if told := [text for text in gather_object([problem]) if text is not None]:
        raise ValueError(told[0])
    return result


def stop_with_launcher() -> None:
    """Get SIGTERM, which saves and stops, when the launcher of this single process has ended.

    Accelerate's launcher of one process does not hand a SIGTERM on: it ends and leaves the process
    behind. Linux only; elsewhere signal the python process itself.
    """
    launcher = find_launcher()
    if sys.platform != "linux" or launcher is None or "TORCHELASTIC_RUN_ID" in os.environ:
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != launcher.pid:  # it ended before we could say so
        os.kill(os.getpid(), signal.SIGTERM)
