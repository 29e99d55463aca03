"""A data collator for transformers' Trainer."""

from collections.abc import Sequence

import torch
from torch.utils.data import default_collate

from pretrain_lib.data.windows.batches import Batch
from pretrain_lib.data.windows.packing import IGNORED_TARGET
from pretrain_lib.models.attention import document_positions


def collate_for_transformers(items: Sequence[Batch]) -> Batch:
    """Collate windows into inputs of transformers' causal language models (a `data_collator`).

    `shift_labels` are the targets; `labels`, by which the Trainer counts targets, are the same
    shifted right by one. With document masking, `position_ids` restart at each document: models of
    transformers whose family heeds them then mask attention across documents, provided that no
    attention mask is given and no cache is made. The Trainer makes none; in a loop of your own, set
    `model.config.use_cache = False`. Families that ignore position ids, such as OPT, MPT and Mamba,
    do not keep documents apart, and say nothing. All tensors are (B, T).
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
