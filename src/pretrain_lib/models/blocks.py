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
    activation_checkpointing: ActivationCheckpointing = "none"
    """What backward computes again: nothing, selective (all but the results of matrix products and
    attention), or the full blocks."""
    z_loss: float = 0.0


def run_blocks(
    blocks: Iterable[nn.Module],
    x: torch.Tensor,
    *shared: object,
    cached_layers: list[CachedLayer] | list[TokenTrees] | None,
    options: TrainingOptions,
) -> torch.Tensor:
    """Send `x` (B, T, D) through all blocks; each is also given `shared` and its cached layer."""
    cached_layers = cached_layers or repeat(None)
    kind = options.activation_checkpointing
    again = kind != "none" and torch.is_grad_enabled()
    for block, cached in zip(blocks, cached_layers, strict=False):
        if again:
            x = checkpoint(block, x, *shared, cached, **_options_of_checkpoint(kind))
        else:
            x = block(x, *shared, cached)
    return x


def _options_of_checkpoint(kind: ActivationCheckpointing) -> dict:
    if kind == "full":
        return {"use_reentrant": False}
    context = partial(create_selective_checkpoint_contexts, _policy)
    return {"use_reentrant": False, "context_fn": context}


def _policy(_: object, operator: object, *args: object, **options: object) -> CheckpointPolicy:
    kept = operator in KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
