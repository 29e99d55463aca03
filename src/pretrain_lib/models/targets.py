"""The targets of a loss: shaped as the hidden states, each an id of the vocabulary or ignored."""

import torch

from pretrain_lib.data.windows.packing import IGNORED_TARGET


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
