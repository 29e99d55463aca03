"""Check that the processes and settings of a launch match the recipe."""

import os

from accelerate import Accelerator, DistributedType
from accelerate.tracking import get_available_trackers

from pretrain_lib.config.settings import Recipe

SUPPORTED = (
    DistributedType.NO,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_CPU,
    DistributedType.FSDP,
)
ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"


def check_trackers(wanted: list[str]) -> None:
    """Raise ValueError for a tracker that is not installed."""
    installed = [str(name) for name in get_available_trackers()]
    for name in wanted:
        if name not in installed:
            raise ValueError(
                f"log.trackers={wanted}: {name} is not installed, or unknown to Accelerate; "
                f"installed: {', '.join(installed) or 'none'} (install pretrain_lib[trackers])"
            )


def check_world(accelerator: Accelerator, *, launched: int, expected: int | None) -> None:
    """Raise ValueError if the world size is not the number of processes launched or expected."""
    running, kind = accelerator.num_processes, accelerator.distributed_type
    if kind not in SUPPORTED:
        raise ValueError(
            f"distributed_type={kind.value} is not supported: give accelerate launch one of the "
            f"files in accelerate_configs/ (one process, DDP, or FSDP2)"
        )
    if running != launched:
        raise ValueError(
            f"{launched} processes were started but Accelerate runs {running}: give accelerate "
            f"launch one of the files in accelerate_configs/"
        )
    if expected is not None and running != expected:
        raise ValueError(
            f"system.processes={expected} but {running} run: check num_processes in the "
            f"configuration of accelerate launch (for several processes on CPUs: cpu_2proc.yaml)"
        )


def check_accumulation(config: Recipe, *, processes: int) -> None:
    """Raise ValueError if the launcher's gradient accumulation differs from the recipe's."""
    batch, told = config.batch, os.environ.get(ACCUMULATION, "1")
    derived = batch.tokens // (processes * batch.micro_batch * batch.sequence_length)
    if told not in ("1", str(derived)):
        raise ValueError(
            f"gradient_accumulation_steps={told} was given to accelerate launch ({ACCUMULATION}) "
            f"but batch.tokens={batch.tokens} makes {derived} micro-batches on {processes} "
            f"processes: omit it, and change batch.tokens or batch.micro_batch instead"
        )
