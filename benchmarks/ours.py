"""Our training step for the benchmarks, put together as `start_run` does it."""

import os
import sys
from dataclasses import replace
from typing import Any

import torch
from contenders import CLIP, FAMILIES, LEARNING_RATE, OURS, Step, Trial

from pretrain_lib.config.settings import (
    BatchConfig,
    OptimizerConfig,
    Recipe,
)
from pretrain_lib.distributed.engine import start_accelerator
from pretrain_lib.optim.groups import build_adamw
from pretrain_lib.training.compilation import choose_compile, set_up_model
from pretrain_lib.training.step import train_step


def build(trial: Trial, changes: dict[str, Any] | None = None) -> Step:
    """Return our step, its parts put together as `start_run` does.

    `changes` are settings of the recipe by their dotted names; by default those of the contender.
    """
    recipe = build_recipe(trial, OURS[trial.contender] if changes is None else changes)
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if trial.dtype == "bf16" else "no"
    accelerator = start_accelerator(recipe)
    if trial.dtype == "bf16" and accelerator.mixed_precision != "bf16":
        sys.exit("error: our engine does not train in bf16 on this machine: measure fp32")
    with torch.device("meta"):
        model = FAMILIES[trial.family][0](recipe.model)
    model.to_empty(device=accelerator.device)
    with torch.no_grad():  # on the device: a billion numbers take a CPU a while
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02)
    # A variant's settings count only as far as they are handed on here.
    set_up_model(
        model,
        compiled=choose_compile(recipe.system.compile, accelerator.device),
        activation_checkpointing=recipe.system.activation_checkpointing,
        z_loss=recipe.optimizer.z_loss,
    )
    options = {"learning_rate": LEARNING_RATE, "moments": recipe.optimizer.moments}
    optimizer = build_adamw(model, **options)
    prepared = accelerator.prepare(model, optimizer)
    documents = {}
    if trial.documents:
        ends = torch.linspace(0, trial.length, trial.documents + 1).int()[1:]
        ends = ends.expand(trial.batch, -1).contiguous()
        documents = {"document_ends": ends.to(accelerator.device)}

    def step(ids: torch.Tensor, targets: torch.Tensor) -> float:
        batches = [{"input_ids": ids, "targets": targets} | documents]
        options = {"learning_rate": LEARNING_RATE, "max_grad_norm": CLIP}
        return train_step(accelerator, *prepared, batches, **options, seed=0, step=0).loss

    return step


def build_recipe(trial: Trial, changes: dict[str, Any]) -> Recipe:
    """Return the recipe of a trial, with some settings changed."""
    length = trial.length
    recipe = Recipe(
        model=trial.config,
        batch=BatchConfig(
            tokens=trial.batch * length, micro_batch=trial.batch, sequence_length=length
        ),
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, max_grad_norm=CLIP),
    )
    for name, value in changes.items():
        section, _, setting = name.partition(".")
        changed = replace(getattr(recipe, section), **{setting: value})
        recipe = replace(recipe, **{section: changed})
    return recipe
