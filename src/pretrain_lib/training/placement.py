"""Place a model and its optimizer on the training devices, sharded or not."""

import torch
from accelerate import Accelerator

from pretrain_lib.config.settings import Recipe
from pretrain_lib.config.training_sections import OptimizerConfig
from pretrain_lib.distributed.sharding import is_sharded, shard_by_block, share_weights
from pretrain_lib.models.interface import Model
from pretrain_lib.optim.groups import build_adamw, build_muon
from pretrain_lib.training.compilation import choose_compile, set_up_model


def place(
    config: Recipe, model: Model, accelerator: Accelerator
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Set the training options of the model, and prepare it and its optimizer with Accelerate.

    The model is placed on its device, sharded or not.
    """
    set_up_model(
        model,
        compiled=choose_compile(config.system.compile, accelerator.device),
        activation_checkpointing=config.system.activation_checkpointing,
        z_loss=config.optimizer.z_loss,
    )
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
