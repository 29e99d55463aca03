"""Optimizer state: the tensors and numbers that an optimizer keeps for each parameter."""

from collections.abc import Iterator

import torch
from torch.distributed.tensor import DTensor

from pretrain_lib.optim.adamw_bf16 import AdamWBf16
from pretrain_lib.optim.muon import MOMENTUM
from pretrain_lib.tensors.files import DTYPES

ADAMW_STATE = ("exp_avg", "exp_avg_sq", "step")


def state_names(optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, tuple[str, ...]]:
    """Return the names of the tensors that AdamW or Muon keeps for each parameter."""
    return {
        parameter: (MOMENTUM,) if group.get("parts") else ADAMW_STATE
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def other_kind(optimizer: torch.optim.Optimizer) -> str | None:
    """Return the class of an optimizer that keeps something else than AdamW and Muon, else None."""
    inner, names = unwrapped(optimizer), state_names(optimizer)
    uses_amsgrad = any(group.get("amsgrad") for group in optimizer.param_groups)
    held = ((parameter, tuple(sorted(state))) for parameter, state in inner.state.items() if state)
    as_known = all(names.get(parameter) == keys for parameter, keys in held)
    is_known = isinstance(inner, torch.optim.Adam) and as_known and not uses_amsgrad
    return None if is_known else type(inner).__name__


def check_holds(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError if an optimizer updates a tensor that is no parameter of the model."""
    parameters = set(model.parameters())
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if strangers := [parameter for parameter in held if parameter not in parameters]:
        raise ValueError(
            f"the optimizer holds other tensors than the model ({len(strangers):,} of its "
            f"{len(held):,} are no parameters of it): build it from this model"
        )


def check_storable(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError if an optimizer keeps anything that a checkpoint cannot hold.

    It holds, for each parameter of the model, scalar tensors and tensors shaped like the parameter.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    for key, what in _unstorable(optimizer, names):
        raise ValueError(
            f"{type(unwrapped(optimizer)).__name__} keeps {what} for {key}, and a checkpoint "
            f"holds scalar tensors and tensors shaped like a parameter of the model: save with "
            f"another optimizer"
        )


def _unstorable(
    optimizer: torch.optim.Optimizer, names: dict[torch.Tensor, str]
) -> Iterator[tuple[str, str]]:
    """Yield whose state cannot be stored, and what it is."""
    for parameter, state in unwrapped(optimizer).state.items():
        if state and parameter not in names:
            is_tensor = isinstance(parameter, torch.Tensor)
            yield ("a tensor that is no parameter" if is_tensor else repr(parameter)), "a state"
        for kind, value in sorted(state.items()) if isinstance(state, dict) else ():
            if not isinstance(value, torch.Tensor):
                yield names[parameter], f"{kind}, a {type(value).__name__}"
            elif value.dtype not in DTYPES:
                yield names[parameter], f"{kind} in {value.dtype}"
            elif value.dim() and not _like(value, parameter):
                yield names[parameter], f"{kind} of shape {tuple(value.shape)}"


def _like(value: torch.Tensor, parameter: torch.Tensor) -> bool:
    is_sharded = isinstance(value, DTensor) == isinstance(parameter, DTensor)
    return is_sharded and value.shape == parameter.shape and value.layout == torch.strided


def moment_dtype(optimizer: torch.optim.Optimizer) -> torch.dtype:
    """Return the dtype of an optimizer's moments; it may be in Accelerate's wrapper."""
    return torch.bfloat16 if isinstance(unwrapped(optimizer), AdamWBf16) else torch.float32


def moment_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the size in bytes of all moments, on all processes together.

    Of an optimizer that is not AdamW or Muon, it is that of what it keeps now.
    """
    if other_kind(optimizer) is not None:
        tensors = (v for state in unwrapped(optimizer).state.values() for v in state.values())
        return sum(value.numel() * value.dtype.itemsize for value in tensors)
    elements = sum(
        parameter.numel() * sum(name != "step" for name in names)
        for parameter, names in state_names(optimizer).items()
    )
    return moment_dtype(optimizer).itemsize * elements


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether `found_inf` on the device makes the next update of an optimizer do nothing.

    torch's fused SGD, too, reads it, but keeps the momentum of a first update without writing it.
    """
    is_known = isinstance(optimizer, torch.optim.Adam | torch.optim.Adagrad)  # and so AdamW, Muon
    return is_known and all(group.get("fused") for group in optimizer.param_groups)


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return an optimizer without Accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
