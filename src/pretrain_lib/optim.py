"""AdamW with the decay groups of GPT-2 and GPT-3. Floor 0."""

import torch
from torch import nn

FUSED_DEVICES = ("cuda", "cpu", "mps")


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict]:
    """Split the parameters: matrices and embeddings decay; biases and norms (1-d) do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def build_adamw(
    model: nn.Module,
    *,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.95),
    epsilon: float = 1e-8,
    weight_decay: float = 0.1,
) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov and Hutter 2019), fused where the parameters' device has it."""
    device = next(model.parameters()).device.type
    return torch.optim.AdamW(
        parameter_groups(model, weight_decay=weight_decay),
        lr=learning_rate,
        betas=betas,
        eps=epsilon,
        fused=device in FUSED_DEVICES,
    )
