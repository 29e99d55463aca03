"""What a process that `accelerate launch` started owes to those beside it. Floor 0."""

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
from accelerate.utils import broadcast_object_list

PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def is_elastic() -> bool:
    """Whether any exit code but 0 makes the launcher start all processes again."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


def is_restart() -> bool:
    """Whether the launcher has started these processes again, and this is the run it was."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def launch_time() -> float:
    """Return when the command was given that started this process, in seconds since the epoch."""
    process = psutil.Process()
    launcher = process.parent() if is_launched() else None
    return (launcher or process).create_time()


def is_launched() -> bool:
    """Whether `accelerate launch` started this process."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ


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


def stop_with_launcher() -> None:
    """Get SIGTERM, which saves and stops, when the launcher of this single process has ended.

    Accelerate's launcher of one process does not hand a SIGTERM on: it ends and leaves the process
    behind. Linux only; elsewhere signal the python process itself.
    """
    parent = os.getppid()
    alone = is_launched() and "TORCHELASTIC_RUN_ID" not in os.environ
    if sys.platform != "linux" or not alone or not _is_accelerate(parent):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != parent:  # it ended before we could say so
        os.kill(os.getpid(), signal.SIGTERM)


def _is_accelerate(process: int) -> bool:
    command = Path(f"/proc/{process}/cmdline")
    return command.is_file() and b"accelerate" in command.read_bytes()
