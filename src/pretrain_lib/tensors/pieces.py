"""The local shard of a tensor under FSDP2, or the whole tensor if it is not sharded."""

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor, Replicate


@dataclass(frozen=True)
class Piece:
    """A rectangular slice of a tensor."""

    tensor: torch.Tensor
    offsets: tuple[int, ...]
    """Where the slice begins in the whole tensor."""
    shape: tuple[int, ...]
    """The shape of the whole tensor."""


def local_piece(tensor: torch.Tensor) -> Piece:
    """Return the piece of `tensor` held by this process; it shares memory with `tensor`."""
    beginning = (0,) * tensor.dim()
    if not isinstance(tensor, DTensor):
        return Piece(tensor.detach(), beginning, tuple(tensor.shape))
    local = tensor.to_local().detach()
    # With fewer rows than ranks some ranks hold an empty piece, which has no offsets.
    offsets = tensor.__create_chunk_list__()[0].offsets if local.numel() else beginning
    return Piece(local, tuple(offsets), tuple(tensor.shape))


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole tensor on every process; a collective call if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(tensor: torch.Tensor, whole: torch.Tensor) -> None:
    """Copy `whole` into a tensor, or its slice into the local piece; missing rows become zero."""
    piece = local_piece(tensor)
    box = whole[box_slices(piece.offsets, piece.tensor.shape)]
    if box.shape != piece.tensor.shape:
        piece.tensor.zero_()
    piece.tensor[box_slices((0,) * box.dim(), box.shape)].copy_(box)


def box_slices(offsets: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Return the slices that select the box of `shape` at `offsets`."""
    return tuple(slice(o, o + size) for o, size in zip(offsets, shape, strict=True))


@dataclass(frozen=True)
class Holder:
    """The position of this process among those that hold the shards of a model."""

    index: int
    count: int
    is_copy: bool = False
    """Whether this process holds a replica: under DDP and HSDP, all but the first group do."""
    group: torch.distributed.ProcessGroup | None = None
    """The process group of the shards; None if this process holds the whole model."""
    first_ranks: tuple[int, ...] = (0,)
    """The ranks that hold the model, or the first of its replicas."""


def find_holder(model: torch.nn.Module) -> Holder:
    """Return which shard of a model this process holds, under one process, DDP, FSDP2 or HSDP."""
    tensor = next(model.parameters())
    if not isinstance(tensor, DTensor):
        distributed = torch.distributed.is_initialized()
        return Holder(0, 1, is_copy=distributed and torch.distributed.get_rank() > 0)
    return holder_of(tensor)


def holder_of(tensor: DTensor) -> Holder:
    """Return which shard of a tensor this process holds, under FSDP2 or HSDP."""
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
