"""Place a model and its optimizer on the training devices, sharded or not."""

import torch
from accelerate import Accelerator

from pretrain_lib.config.settings import Recipe
from pretrain_lib.distributed.sharding import is_sharded, share_weights
from pretrain_lib.models.hf import Model
from pretrain_lib.optim.groups import build_adamw


def place(
    config: Recipe, model: Model, accelerator: Accelerator
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Place the model on its device, sharded or not; return it and its optimizer, both prepared."""
    if next(model.parameters()).is_meta:
        # The OS allocates pages on first write only, so the whole model need not fit in memory.
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
