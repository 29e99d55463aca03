"""Windows for the loaders of others: transformers' Trainer."""

from collections.abc import Sequence

import torch
from torch.utils.data import default_collate

from pretrain_lib.data.windows.batches import Batch
from pretrain_lib.data.windows.packing import IGNORED_TARGET
from pretrain_lib.models.attention import document_positions


def collate_for_transformers(items: Sequence[Batch]) -> Batch:
    """Return windows stacked as the causal models of transformers take them: a `data_collator`.

    `shift_labels` are the targets as they are; `labels`, by which the Trainer counts targets, stand
    one place later. Where documents are known, `position_ids` restart in each, by which these
    models keep them apart as long as no attention mask is given. `(B, T)` per tensor.
    """
    batch = default_collate(items)
    targets = batch["targets"]
    labels = torch.full_like(targets, IGNORED_TARGET)
    labels[:, 1:] = targets[:, :-1]
    inputs = {"input_ids": batch["input_ids"], "labels": labels, "shift_labels": targets}
    if "document_ends" in batch:
        ends, length = batch["document_ends"], targets.shape[1]
        inputs["position_ids"] = document_positions(ends, length)
    return inputs
