"""Build an optimizer: AdamW for all parameters, or Muon for the matrices of the layers."""

import torch
from torch import nn

from pretrain_lib.optim.adamw_bf16 import AdamWBf16
from pretrain_lib.optim.arguments import Moments, check_moments
from pretrain_lib.optim.muon import Muon, MuonBf16
from pretrain_lib.optim.parameters import rated_groups
from pretrain_lib.values import check_value

FUSED_DEVICES = ("cuda", "cpu", "mps")


def build_adamw(
    model: nn.Module,
    *,
    learning_rate: float,
    matrix_learning_rate: float | None = None,
    embedding_learning_rate: float | None = None,
    betas: tuple[float, float] = (0.9, 0.95),
    epsilon: float = 1e-8,
    weight_decay: float = 0.1,
    moments: Moments = "fp32",
) -> torch.optim.AdamW:
    """Build AdamW (Loshchilov and Hutter 2019), fused if the device of the parameters supports it.

    Matrices of the layers and embedding tables may have learning rates of their own (None:
    `learning_rate`). Each group starts at its own `lr`, which torch's schedulers multiply;
    `train_step` sets it to the scheduled rate times the group's `lr_factor`. `moments` is the dtype
    in which both moments are stored: fp32, or bf16 (`AdamWBf16`).
    """
    check_moments(moments, betas)
    rates = learning_rate, matrix_learning_rate, embedding_learning_rate
    groups = rated_groups(model, *rates, weight_decay=weight_decay)
    kind = AdamWBf16 if moments == "bf16" else torch.optim.AdamW
    fused = next(model.parameters()).device.type in FUSED_DEVICES
    return kind(groups, lr=learning_rate, betas=betas, eps=epsilon, fused=fused)


def build_muon(
    model: nn.Module,
    *,
    learning_rate: float,
    matrix_learning_rate: float | None = None,
    embedding_learning_rate: float | None = None,
    momentum: float = 0.95,
    betas: tuple[float, float] = (0.9, 0.95),
    epsilon: float = 1e-8,
    weight_decay: float = 0.1,
    moments: Moments = "fp32",
    dtype: torch.dtype = torch.float32,
) -> Muon | MuonBf16:
    """Build Muon (Jordan et al. 2024) for the matrices of the layers, with AdamW for all else.

    `matrix_learning_rate` is Muon's (None: `learning_rate`). `dtype` is that of the
    orthogonalization: fp32, or bf16 as under autocast. The other arguments are those of
    `build_adamw`. A layer is a numbered module, as of an `nn.ModuleList`; ValueError without any.
    """
    check_value(momentum, "momentum", float, minimum=0, below=1)
    if dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"dtype={dtype!r} must be torch.bfloat16, torch.float32 or torch.float64")
    check_moments(moments, betas)
    rates = learning_rate, matrix_learning_rate, embedding_learning_rate
    groups = rated_groups(model, *rates, weight_decay=weight_decay, muon=True)
    if not any(group["parts"] for group in groups):
        raise ValueError(
            f"{type(model).__name__} has no matrix in a numbered layer for Muon to update: hold "
            f"its layers in an nn.ModuleList or nn.Sequential, or use AdamW (optimizer.kind=adamw)"
        )
    kind = MuonBf16 if moments == "bf16" else Muon
    fused = next(model.parameters()).device.type in FUSED_DEVICES
    options = {"lr": learning_rate, "betas": betas, "eps": epsilon, "fused": fused}
    return kind(groups, momentum=momentum, dtype=dtype, **options)
