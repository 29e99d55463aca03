"""Parameter groups: who shares a weight decay, a learning rate and an update rule."""

import re
from typing import Any

from torch import nn

from pretrain_lib.optim.arguments import check_rates
from pretrain_lib.values import check_value

IN_A_LAYER = re.compile(r"(?:^|\.)\d+\.")  # such as transformer.h.3.attn.c_attn.weight


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    matrix_factor: float = 1.0,
    embedding_factor: float = 1.0,
    muon: bool = False,
) -> list[dict]:
    """Return the parameter groups of an optimizer.

    Tensors of two or more dimensions decay, biases and norms (1-d) do not. `train_step` multiplies
    the scheduled learning rate by the `lr_factor` of a group: `matrix_factor` for the matrices of
    the layers, `embedding_factor` for embedding tables (a tied output head is one), 1 for all else.
    `parts` of a group is 0 if AdamW updates it. With `muon`, it is the number of matrices that are
    stacked in each matrix of a layer: 3 in GPT-2's joint projection for queries, keys and values,
    else 1.
    """
    check_value(weight_decay, "weight_decay", float, minimum=0)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups: dict[tuple, list] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay, factor, parts = weight_decay, 1.0, 0
        if parameter.dim() < 2:
            decay = 0.0
        elif id(parameter) in tables:
            factor = embedding_factor
        elif _is_layer_matrix(name, parameter):
            factor, parts = matrix_factor, _count_parts(name, parameter) if muon else 0
        groups.setdefault((decay, factor, parts), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_factor": factor, "parts": parts}
        for (decay, factor, parts), parameters in groups.items()
    ]


def rated_groups(
    model: nn.Module, peak: float, matrix: float | None, embedding: float | None, **options: Any
) -> list[dict]:
    """Return the parameter groups, each at its own learning rate, a multiple of `peak`."""
    check_rates(peak, matrix_learning_rate=matrix, embedding_learning_rate=embedding)
    groups = parameter_groups(
        model,
        matrix_factor=1.0 if matrix is None else matrix / peak,
        embedding_factor=1.0 if embedding is None else embedding / peak,
        **options,
    )
    return [group | {"lr": peak * group["lr_factor"]} for group in groups]


def _is_layer_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Return whether a parameter is a matrix of a layer, by its name and shape."""
    return parameter.dim() == 2 and IN_A_LAYER.search(name) is not None


def _count_parts(name: str, parameter: nn.Parameter) -> int:
    rows, columns = parameter.shape
    return 3 if name.endswith("c_attn.weight") and rows == 3 * columns else 1
