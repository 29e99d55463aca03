"""Place a model and its optimizer on the training devices, sharded or not."""

import torch
from accelerate import Accelerator

from pretrain_lib.config.settings import Recipe
from pretrain_lib.config.training_sections import OptimizerConfig
from pretrain_lib.distributed.sharding import is_sharded, shard_by_block, share_weights
from pretrain_lib.models.interface import Model
from pretrain_lib.optim.groups import build_adamw, build_muon


def place(
    config: Recipe, model: Model, accelerator: Accelerator
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Place the model on its device, sharded or not; return it and its optimizer, both prepared."""
    if next(model.parameters()).is_meta:
        # The OS allocates pages on first write only, so the whole model need not fit in memory.
        model.to_empty(device="cpu")
    elif is_sharded(accelerator):
        share_weights(model, accelerator)
    if is_sharded(accelerator):
        shard_by_block(model, accelerator)
    return accelerator.prepare(model, _build_optimizer(config.optimizer, model, accelerator))


def _build_optimizer(
    settings: OptimizerConfig, model: Model, accelerator: Accelerator
) -> torch.optim.Optimizer:
    options = {
        "learning_rate": settings.learning_rate,
        "matrix_learning_rate": settings.matrix_learning_rate,
        "embedding_learning_rate": settings.embedding_learning_rate,
        "betas": settings.betas,
        "epsilon": settings.epsilon,
        "weight_decay": settings.weight_decay,
        "moments": settings.moments,
    }
    if settings.kind == "adamw":
        return build_adamw(model, **options)
    low_precision = accelerator.mixed_precision != "no"
    dtype = torch.bfloat16 if low_precision else torch.float32
    return build_muon(model, momentum=settings.momentum, dtype=dtype, **options)
