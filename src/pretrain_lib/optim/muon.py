"""Muon for the matrices of the layers, and AdamW for all else, as one optimizer.

torch's own Muon always computes in bf16, waits for the device to skip an update, and under FSDP2
computes on shards; this one does not.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch

from pretrain_lib.optim.adamw_bf16 import AdamWBf16
from pretrain_lib.optim.matrix_sharing import MatrixSharing, find_sharing
from pretrain_lib.optim.newton_schulz import orthogonalize
from pretrain_lib.tensors.pieces import local_piece

MOMENTUM = "momentum_buffer"
# Makes the root mean square of an update about that of AdamW's (Liu et al. 2025, section 2.2).
SCALE = 0.2
# Elements that a process orthogonalizes at a time, which bounds the memory beside the weights.
BATCH_ELEMENTS = 2**25


class _MatrixUpdates(torch.optim.AdamW):
    """Updates the groups with `parts` by Muon, and leaves the others to the base class."""

    def __init__(
        self, groups: list[dict], *, momentum: float, dtype: torch.dtype, **options: object
    ) -> None:
        super().__init__(groups, **options)
        self.momentum = momentum
        self.dtype = dtype

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"momentum": self.momentum, "dtype": self.dtype}

    def __setstate__(self, state: dict) -> None:
        """Restore a state, also after `load_state_dict`; that of a matrix is its momentum alone."""
        momenta = {p: values for p, values in state["state"].items() if MOMENTUM in values}
        adamw_state = {p: values for p, values in state["state"].items() if p not in momenta}
        super().__setstate__(state | {"state": defaultdict(dict, adamw_state)})  # reads their steps
        self.state.update(momenta)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        """Update the parameters; closures are not supported.

        All processes that hold the parameters must call this together. The gradients of the
        matrices are dropped.
        """
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            if group.get("parts"):  # a group that was added later has none
                for parameters, sharing in _batches(group["params"]):
                    self._update_matrices(parameters, group, sharing)
        super().step()

    def _update_matrices(
        self, parameters: list[torch.Tensor], group: dict, sharing: MatrixSharing
    ) -> None:
        """Update matrices of one shape (Jordan et al. 2024), with decoupled weight decay."""
        rows, columns = parameters[0].shape
        parts = group["parts"]

        def orthogonal(whole: torch.Tensor) -> torch.Tensor:
            return orthogonalize(whole.view(-1, rows // parts, columns)).reshape(-1, rows, columns)

        directions = torch.stack([self._advance_momentum(p) for p in parameters])
        updates = sharing.apply(orthogonal, directions, rows)
        rate = group["lr"]
        scale = SCALE * math.sqrt(max(rows // parts, columns))
        for parameter, update in zip(parameters, updates, strict=True):
            weights = local_piece(parameter).tensor
            new = weights * (1 - rate * group["weight_decay"])
            self._replace(weights, new.add_(update, alpha=-rate * scale))
            parameter.grad = None  # the base class passes over parameters without one

    def _advance_momentum(self, parameter: torch.Tensor) -> torch.Tensor:
        """Update the momentum of a matrix; return Nesterov's direction, in `dtype`."""
        state = self.state[parameter]
        if not state:
            dtype = torch.bfloat16 if isinstance(self, AdamWBf16) else parameter.dtype
            state[MOMENTUM] = torch.zeros_like(parameter, dtype=dtype)
        momentum = local_piece(state[MOMENTUM]).tensor
        gradient = local_piece(parameter.grad).tensor
        new = momentum.to(gradient.dtype).lerp(gradient, 1 - self.momentum)
        self._replace(momentum, new)
        return gradient.lerp(new, self.momentum).to(self.dtype)

    def _replace(self, old: torch.Tensor, new: torch.Tensor) -> None:
        """Write `new` over `old`, unless the update is to be skipped, which the device decides."""
        skip = getattr(self, "found_inf", None)
        old.copy_(new if skip is None else torch.where(skip.bool(), old, new))


class Muon(_MatrixUpdates):
    """Muon with momentum and moments in the dtype of the parameters."""


class MuonBf16(_MatrixUpdates, AdamWBf16):
    """Muon with momentum and moments stored in bf16, and updated in fp32."""


def _batches(parameters: list[torch.Tensor]) -> Iterator[tuple[list[torch.Tensor], MatrixSharing]]:
    """Yield matrices of one shape that are updated together, and where the work is dealt."""
    by_shape = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            by_shape[parameter.shape].append(parameter)
    for shape, same in by_shape.items():
        sharing = find_sharing(same[0])
        size = sharing.count * max(1, BATCH_ELEMENTS // shape.numel())
        for first in range(0, len(same), size):
            yield same[first : first + size], sharing
