"""AdamW with the weight-decay groups of GPT-2 and GPT-3."""

import torch
from torch import nn

from pretrain_lib.optim.adamw_bf16 import AdamWBf16

FUSED_DEVICES = ("cuda", "cpu", "mps")


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict]:
    """Return two groups: matrices and embeddings decay, biases and norms (1-d) do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def moment_dtype(optimizer: torch.optim.Optimizer) -> torch.dtype:
    """Return the dtype of an optimizer's moments; it may be in Accelerate's wrapper."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return torch.bfloat16 if isinstance(inner, AdamWBf16) else torch.float32


def build_adamw(
    model: nn.Module,
    *,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.95),
    epsilon: float = 1e-8,
    weight_decay: float = 0.1,
    moments: str = "fp32",
) -> torch.optim.AdamW:
    """Build AdamW (Loshchilov and Hutter 2019), fused if the device of the parameters supports it.

    `moments` is the dtype in which both moments are stored: fp32, or bf16 (`AdamWBf16`).
    """
    device = next(model.parameters()).device.type
    kind = AdamWBf16 if moments == "bf16" else torch.optim.AdamW
    return kind(
        parameter_groups(model, weight_decay=weight_decay),
        lr=learning_rate,
        betas=betas,
        eps=epsilon,
        fused=device in FUSED_DEVICES,
    )
