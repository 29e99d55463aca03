"""The part of a tensor that this process holds, where FSDP2 has cut it; else all of it."""

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor, Replicate


@dataclass(frozen=True)
class Piece:
    """A box of a tensor."""

    tensor: torch.Tensor
    offsets: tuple[int, ...]
    """Where the box begins in the whole."""
    shape: tuple[int, ...]
    """The whole's."""


def local_piece(tensor: torch.Tensor) -> Piece:
    """Return the piece that this process holds; it shares its memory with `tensor`."""
    beginning = (0,) * tensor.dim()
    if not isinstance(tensor, DTensor):
        return Piece(tensor.detach(), beginning, tuple(tensor.shape))
    local = tensor.to_local().detach()
    # With fewer rows than processes some hold nothing, which begins nowhere.
    offsets = tensor.__create_chunk_list__()[0].offsets if local.numel() else beginning
    return Piece(local, tuple(offsets), tuple(tensor.shape))


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of a tensor on every process; they have to call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(tensor: torch.Tensor, whole: torch.Tensor) -> None:
    """Set a tensor, or the piece of it held here, to `whole`; rows that it lacks become zero."""
    piece = local_piece(tensor)
    box = whole[box_slices(piece.offsets, piece.tensor.shape)]
    if box.shape != piece.tensor.shape:
        piece.tensor.zero_()
    piece.tensor[box_slices((0,) * box.dim(), box.shape)].copy_(box)


def box_slices(offsets: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Return what cuts a box out of a tensor."""
    return tuple(slice(o, o + size) for o, size in zip(offsets, shape, strict=True))


@dataclass(frozen=True)
class Holder:
    """Which of the processes that hold a model between them this one is."""

    index: int
    count: int
    is_copy: bool = False
    """Whether other processes hold the same: of HSDP's groups all but the first."""
    group: torch.distributed.ProcessGroup | None = None
    """All of them; None if this process holds everything."""
    first_ranks: tuple[int, ...] = (0,)
    """The ranks of those that hold the model, or its first copy."""


def find_holder(model: torch.nn.Module) -> Holder:
    """Return this process's share in a model, whether one process, DDP, FSDP2 or HSDP."""
    tensor = next(model.parameters())
    if not isinstance(tensor, DTensor):
        distributed = torch.distributed.is_initialized()
        return Holder(0, 1, is_copy=distributed and torch.distributed.get_rank() > 0)
    mesh, coordinates = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    copies = [isinstance(placement, Replicate) for placement in tensor.placements]
    (dimension,) = (i for i, copied in enumerate(copies) if not copied)
    first = mesh.mesh[tuple(0 if copied else slice(None) for copied in copies)]
    return Holder(
        index=coordinates[dimension],
        count=mesh.size(dimension),
        is_copy=any(c for c, copied in zip(coordinates, copies, strict=True) if copied),
        group=mesh.get_group(dimension),
        first_ranks=tuple(first.tolist()),
    )
