"""How a model is run: compiled or not, and what backward computes again."""

import os
import shutil

import torch

from pretrain_lib.models.blocks import TrainingOptions
from pretrain_lib.models.hf import Model

COMPILERS = (os.environ.get("CXX", "g++"), "clang++")  # as torch looks for them


def set_up_model(
    model: Model,
    *,
    compiled: bool,
    activation_checkpointing: str = "none",
    z_loss: float = 0.0,
) -> None:
    """Choose how `model` trains; in place, before `accelerator.prepare`.

    Blocks are compiled one by one: all share a graph, which takes a fraction of the time that the
    whole model's would.
    """
    for block in model.blocks:
        block.activation_checkpointing = activation_checkpointing
        if compiled:
            block.compile()
    model.options = TrainingOptions(compiled=compiled, z_loss=z_loss)


def choose_compile(wanted: bool | None, device: torch.device) -> bool:
    """Return whether to compile: as asked for, else on CUDA, where it pays at once.

    Raises ValueError if the device is a CPU and there is no compiler for it.
    """
    if wanted and device.type == "cpu" and not any(map(shutil.which, COMPILERS)):
        raise ValueError(
            f"system.compile=true needs a C++ compiler on a CPU, and none of "
            f"{', '.join(COMPILERS)} is on the PATH: install one, or leave system.compile at null"
        )
    return device.type == "cuda" if wanted is None else wanted


def run_eagerly() -> torch.compiler.set_stance:
    """Return a context in which nothing is compiled: for shapes that change from call to call."""
    return torch.compiler.set_stance("force_eager")
