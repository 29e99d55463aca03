"""Compilation and activation checkpointing of a model."""

import os
import shutil

import torch

from pretrain_lib.models.any_model import checkpoint_activations
from pretrain_lib.models.blocks import ActivationCheckpointing, TrainingOptions
from pretrain_lib.models.interface import Model, unwrap
from pretrain_lib.values import check_value

COMPILERS = (os.environ.get("CXX", "g++"), "clang++")  # those that torch looks for


def set_up_model(
    model: Model,
    *,
    compiled: bool = False,
    activation_checkpointing: ActivationCheckpointing = "none",
    z_loss: float = 0.0,
) -> None:
    """Set the training options of `model` in place; call it before `accelerator.prepare`.

    Blocks are compiled one by one (regional compilation): all share one graph, which compiles in a
    fraction of the time that the whole model would take. `activation_checkpointing` is none,
    selective or full, `z_loss` the coefficient that `linear_cross_entropy` takes, in training mode.
    """
    check_value(activation_checkpointing, "activation_checkpointing", ActivationCheckpointing)
    check_value(z_loss, "z_loss", float, minimum=0)
    model = unwrap(model)
    checkpoint_activations(model, activation_checkpointing)
    for block in model.blocks if compiled else ():
        block.compile()
    model.options = TrainingOptions(compiled=compiled, z_loss=z_loss)


def choose_compile(wanted: bool | None, device: torch.device) -> bool:
    """Return whether to compile: `wanted`, or by default only on CUDA, where it pays off quickly.

    Raises ValueError if the device is a CPU and there is no compiler for it.
    """
    if wanted and device.type == "cpu" and not any(map(shutil.which, COMPILERS)):
        raise ValueError(
            f"system.compile=true needs a C++ compiler on a CPU, and none of "
            f"{', '.join(COMPILERS)} is on the PATH: install one, or leave system.compile at null"
        )
    return device.type == "cuda" if wanted is None else wanted


def run_eagerly() -> torch.compiler.set_stance:
    """Return a context manager that disables compilation, for inputs whose shapes vary."""
    return torch.compiler.set_stance("force_eager")
