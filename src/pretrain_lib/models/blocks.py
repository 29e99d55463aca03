"""Blocks one after another; their activations are kept, or computed again in backward.

(Chen et al. 2016; what is kept selectively is what matrix products and attention return.)
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
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.torch_attn._varlen_attn.default,
    torch.ops.pretrain_lib.document_attention.default,
)


@dataclass(frozen=True)
class TrainingOptions:
    """How a model trains; `speed.set_up_model` chooses."""

    compiled: bool = False
    """Whether the blocks and the loss are compiled."""
    z_loss: float = 0.0


class CheckpointedBlock(nn.Module):
    """A block whose `compute` runs again in backward where activation checkpointing asks for it.

    Inside the block, so that a compiler sees it and keeps what is to be kept.
    """

    activation_checkpointing: ActivationCheckpointing = "none"
    """none, selective (backward computes again all but the results of matrix products and of
    attention), or full (all but the block's input)."""

    def forward(self, x: torch.Tensor, *shared: object) -> torch.Tensor:
        """Return `compute(x, *shared)`, (B, T, D)."""
        if self.activation_checkpointing == "none" or not torch.is_grad_enabled():
            return self.compute(x, *shared)
        options = _checkpoint_options(self.activation_checkpointing)
        return checkpoint(self.compute, x, *shared, **options)


def run_blocks(
    blocks: Iterable[nn.Module],
    x: torch.Tensor,
    *shared: object,
    cached_layers: list[CachedLayer] | list[TokenTrees] | None,
) -> torch.Tensor:
    """Send `x` (B, T, D) through all blocks; each is also given `shared` and its cached layer."""
    for block, cached in zip(blocks, cached_layers or repeat(None), strict=False):
        x = block(x, *shared, cached)
    return x


def _checkpoint_options(kind: ActivationCheckpointing) -> dict:
    if kind == "full":
        return {"use_reentrant": False}
    context = partial(create_selective_checkpoint_contexts, _policy)
    return {"use_reentrant": False, "context_fn": context}


def _policy(_: object, operator: object, *args: object, **options: object) -> CheckpointPolicy:
    kept = operator in KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
