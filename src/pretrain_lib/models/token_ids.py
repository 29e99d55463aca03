"""Check that input ids and targets are within the vocabulary."""

import torch

from pretrain_lib.data.windows.packing import IGNORED_TARGET


def check_input_ids(input_ids: torch.Tensor, vocabulary_size: int) -> None:
    """Raise ValueError for an id that the vocabulary lacks; only on a CPU, where that is free.

    The rows by which an embedding table is padded are no ids, although they can be looked up.
    """
    if input_ids.device.type != "cpu" or torch.compiler.is_compiling() or not input_ids.numel():
        return
    low, high = (int(bound) for bound in torch.aminmax(input_ids))
    if low < 0 or high >= vocabulary_size:
        raise ValueError(
            f"input_ids hold {low if low < 0 else high}: the model's vocabulary has "
            f"{vocabulary_size} tokens, ids from 0; give it as many as the data has "
            f"(model.vocabulary_size)"
        )


def flatten_checked(
    hidden: torch.Tensor, targets: torch.Tensor, vocabulary_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:
    """Return hidden states (N, D), targets (N,), and a factor of the loss: 1, or NaN.

    To raise for wrong targets on a GPU would be to wait for it, and to stay within one graph a
    compiler must not branch: there the wrong ones are ignored, and the factor is NaN.
    """
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets of shape {tuple(targets.shape)} do not fit hidden states of shape "
            f"{tuple(hidden.shape)}: they must have the shape {tuple(hidden.shape[:-1])}"
        )
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    wrong = (targets != IGNORED_TARGET) & ((targets < 0) | (targets >= vocabulary_size))
    if targets.device.type != "cpu" or torch.compiler.is_compiling():
        one = hidden.new_ones((), dtype=torch.float32)
        targets = targets.masked_fill(wrong, IGNORED_TARGET)
        return hidden, targets, one.masked_fill(wrong.any(), torch.nan)
    if wrong.any():
        raise ValueError(
            f"targets hold {targets[wrong][0]}: a target must be an id from 0 to "
            f"{vocabulary_size - 1}, or {IGNORED_TARGET} (IGNORED_TARGET) to be left out"
        )
    return hidden, targets, 1.0
