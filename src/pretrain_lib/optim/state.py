"""What an optimizer keeps for each parameter."""

import torch

from pretrain_lib.optim.adamw_bf16 import AdamWBf16
from pretrain_lib.optim.muon import MOMENTUM

ADAMW_STATE = ("exp_avg", "exp_avg_sq", "step")


def state_names(optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, tuple[str, ...]]:
    """Return the names of the tensors that an optimizer keeps for each parameter."""
    return {
        parameter: (MOMENTUM,) if group.get("parts") else ADAMW_STATE
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def moment_dtype(optimizer: torch.optim.Optimizer) -> torch.dtype:
    """Return the dtype of an optimizer's moments; it may be in Accelerate's wrapper."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return torch.bfloat16 if isinstance(inner, AdamWBf16) else torch.float32


def moment_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the size in bytes of all moments, on all processes together."""
    elements = sum(
        parameter.numel() * sum(name != "step" for name in names)
        for parameter, names in state_names(optimizer).items()
    )
    return moment_dtype(optimizer).itemsize * elements
