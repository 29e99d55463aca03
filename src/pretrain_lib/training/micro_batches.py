"""Check the micro-batches of a step, and count their targets."""

from collections.abc import Iterable, Mapping

import torch
from accelerate import Accelerator
from torch import distributed

from pretrain_lib.data.windows.packing import IGNORED_TARGET

EXPECTED = "a list of micro-batches {'input_ids': ..., 'targets': ...}"


def count_targets(
    accelerator: Accelerator, micro_batches: Iterable[Mapping[str, torch.Tensor]]
) -> tuple[list[Mapping[str, torch.Tensor]], torch.Tensor]:
    """Return micro-batches as a list, and the number of targets that are not ignored, ().

    The number is that of all processes. Raises ValueError unless there is at least one micro-batch,
    and each is a mapping that holds `targets`.
    """
    _check_processes(accelerator)
    if isinstance(micro_batches, Mapping):
        raise ValueError(f"micro_batches must be {EXPECTED}, not one of them: put it into a list")
    listed = list(micro_batches)
    if not listed:
        raise ValueError(f"micro_batches is empty; it must be {EXPECTED}, at least one")
    for index, batch in enumerate(listed):
        is_mapping = isinstance(batch, Mapping)
        if not is_mapping or not isinstance(batch.get("targets"), torch.Tensor):
            actual = f"has {', '.join(map(str, batch))}" if is_mapping else type(batch).__name__
            raise ValueError(
                f"micro_batches[{index}] {'' if is_mapping else 'is '}{actual}; micro_batches must "
                f"be {EXPECTED}, whose targets are the ids that follow input_ids, shifted by one"
            )
    targets = sum((batch["targets"] != IGNORED_TARGET).sum() for batch in listed)
    return listed, accelerator.reduce(targets, "sum")


def _check_processes(accelerator: Accelerator) -> None:
    """Raise ValueError if each process would train a model of its own."""
    count = distributed.get_world_size() if distributed.is_initialized() else 1
    if accelerator.num_processes != count:
        raise ValueError(
            f"accelerator counts {accelerator.num_processes}, torch.distributed {count} processes, "
            f"each of which would train a model of its own: without GPUs, use Accelerator(cpu=True)"
        )
