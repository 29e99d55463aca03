"""A model and its optimizer put where they train: whole, or in pieces."""

import torch
from accelerate import Accelerator

from pretrain_lib.config.settings import Recipe
from pretrain_lib.distributed.sharding import is_sharded, share_weights
from pretrain_lib.models.hf import Model
from pretrain_lib.optim.groups import build_adamw


def place(
    config: Recipe, model: Model, accelerator: Accelerator
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Put the model where it trains, whole or in pieces; return it and its optimizer, prepared."""
    if next(model.parameters()).is_meta:
        # Memory that nobody has touched takes no room, so the whole need not fit anywhere.
        model.to_empty(device="cpu")
    elif is_sharded(accelerator):
        share_weights(model, accelerator)
    optimizer = build_adamw(
        model,
        learning_rate=config.optimizer.learning_rate,
        betas=config.optimizer.betas,
        epsilon=config.optimizer.epsilon,
        weight_decay=config.optimizer.weight_decay,
        moments=config.optimizer.moments,
    )
    return accelerator.prepare(model, optimizer)
