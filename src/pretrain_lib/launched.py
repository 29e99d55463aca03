"""What a process that `accelerate launch` started owes to those beside it. Floor 0."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def is_elastic() -> bool:
    """Whether any exit code but 0 makes the launcher start all processes again."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


def refuse_together(reason: str) -> None:
    """Let the processes of an elastic launch end together, for the main one's reason.

    It ends with 0, lest it be started again, upon which nobody would end the others: they wait for
    its message, here or when they start (`meet_main_rank`).
    """
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    if is_elastic() and not alone and not PartialState._shared_state:  # they have not met
        PartialState(cpu=not torch.cuda.is_available())
        broadcast_object_list([None, reason])
        torch.distributed.barrier()  # nobody leaves while another still listens
        torch.distributed.destroy_process_group()  # or its threads may abort the exit


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
    if sys.platform != "linux" or not _is_launcher(parent):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != parent:  # it ended before we could say so
        os.kill(os.getpid(), signal.SIGTERM)


def _is_launcher(process: int) -> bool:
    if "ACCELERATE_MIXED_PRECISION" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        return False
    command = Path(f"/proc/{process}/cmdline")
    return command.is_file() and b"accelerate" in command.read_bytes()
