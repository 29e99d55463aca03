"""Check the micro-batches of a step, and count their targets."""

from collections.abc import Iterable, Mapping

import torch

from pretrain_lib.data.windows.packing import IGNORED_TARGET

EXPECTED = "a list of micro-batches {'input_ids': ..., 'targets': ...}"


def count_targets(
    micro_batches: Iterable[Mapping[str, torch.Tensor]],
) -> tuple[list[Mapping[str, torch.Tensor]], torch.Tensor]:
    """Return micro-batches as a list, and the number of their targets that are not ignored, ().

    Raises ValueError unless there is at least one, and each is a mapping that holds `targets`.
    """
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
    return listed, sum((batch["targets"] != IGNORED_TARGET).sum() for batch in listed)
