"""Run transformer blocks, with or without activation checkpointing (Chen et al. 2016).

Selective activation checkpointing keeps the outputs of matrix products and attention, and
recomputes the rest in backward.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import pretrain_lib.models.document_attention  # noqa: F401 (registers its operator)
from pretrain_lib.models.cache import CachedLayer, TokenTrees

ActivationCheckpointing = Literal["none", "selective", "full"]
KEPT = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_mm.default,  # of float8
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.torch_attn._varlen_attn.default,
    torch.ops.pretrain_lib.document_attention.default,
)


@dataclass(frozen=True)
class TrainingOptions:
    """Training options of a model, set by `training.compilation.set_up_model`."""

    compiled: bool = False
    """Whether the blocks and the loss are compiled."""
    z_loss: float = 0.0


class CheckpointedBlock(nn.Module):
    """A transformer block that applies activation checkpointing to its `compute` method.

    The checkpointing is inside the block, so that a compiled block includes it and follows its
    policy on what to keep.
    """

    activation_checkpointing: ActivationCheckpointing = "none"
    """none, selective (backward recomputes everything except the outputs of matrix products and
    attention), or full (everything except the block's input)."""

    def forward(self, x: torch.Tensor, *shared: object) -> torch.Tensor:
        """Return `compute(x, *shared)`, (B, T, D)."""
        if self.activation_checkpointing == "none" or not torch.is_grad_enabled():
            return self.compute(x, *shared)
        options = checkpoint_options(self.activation_checkpointing)
        return checkpoint(self.compute, x, *shared, **options)


def run_blocks(
    blocks: Iterable[nn.Module],
    x: torch.Tensor,
    *shared: object,
    cached_layers: list[CachedLayer] | list[TokenTrees] | None,
) -> torch.Tensor:
    """Apply all blocks to `x` (B, T, D); each also receives `shared` and its own cached layer."""
    for block, cached in zip(blocks, cached_layers or repeat(None), strict=False):
        x = block(x, *shared, cached)
    return x


def checkpoint_options(kind: ActivationCheckpointing) -> dict:
    if kind == "full":
        return {"use_reentrant": False}
    context = partial(create_selective_checkpoint_contexts, _policy)
    return {"use_reentrant": False, "context_fn": context}


def _policy(_: object, operator: object, *args: object, **options: object) -> CheckpointPolicy:
    is_kept = operator in KEPT
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE
