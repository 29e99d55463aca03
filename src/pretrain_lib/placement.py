"""A model and its optimizer put where they train: whole, or in pieces. Floor 5."""

import torch
from accelerate import Accelerator

from pretrain_lib.config import Recipe
from pretrain_lib.models.hf import Model
from pretrain_lib.optim import build_adamw
from pretrain_lib.sharding import is_sharded, share_weights


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
