"""Safetensors files of sharded tensors, in the layout of torch.distributed.checkpoint.

The header of each file holds the offsets of its pieces in the whole tensors, in the format of
`HuggingFaceStorageReader`, so any number of processes can read what any other number wrote.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from pretrain_lib.tensors.files import write_tensors
from pretrain_lib.tensors.pieces import Piece, box_slices

WHERE = "DCP_SHARDING_INFO"


@dataclass(frozen=True)
class StoredPiece:
    """A piece in a file; its tensor is memory-mapped and read on use."""

    path: Path
    name: str
    piece: Piece


def write_pieces(
    path: Path, pieces: Mapping[str, Piece], *, notes: Mapping[str, str] | None = None
) -> str:
    """Write pieces, by tensor name, to a safetensors file; return its xxh3_128.

    `notes` are further entries of the metadata.
    """
    where = {
        name: {"saved_offsets": list(piece.offsets), "shape": list(piece.shape)}
        for name, piece in pieces.items()
    }
    metadata = {"format": "pt", "DCP_VERSION": "1.0", WHERE: json.dumps(where)} | dict(notes or {})
    tensors = {name: piece.tensor for name, piece in pieces.items()}
    return write_tensors(path, tensors, metadata=metadata)


def read_pieces(paths: Iterable[Path]) -> dict[str, list[StoredPiece]]:
    """Return the pieces of each tensor in the files, by name; only headers are read yet."""
    stored = defaultdict(list)
    for path in sorted(paths):
        with safe_open(path, framework="pt") as tensors:
            where = json.loads((tensors.metadata() or {}).get(WHERE, "{}"))
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                tensor, place = tensors.get_tensor(name), where[name]
                piece = Piece(tensor, tuple(place["saved_offsets"]), tuple(place["shape"]))
                stored[name].append(StoredPiece(path, name, piece))
    return dict(stored)


def read_note(path: Path, name: str) -> str | None:
    """Return the note `name` of a file that `write_pieces` wrote, None if it has none."""
    with safe_open(path, framework="pt") as tensors:
        return (tensors.metadata() or {}).get(name)


def fill_piece(own: Piece, stored: list[StoredPiece]) -> None:
    """Copy the stored pieces of a tensor into the piece held here.

    Raises ValueError if the shapes of the whole tensors differ, or if the stored pieces hold more
    or fewer elements of this piece than it has.
    """
    copied = 0
    for part in stored:
        if part.piece.shape != own.shape:
            raise ValueError(
                f"{part.path}: {part.name} has the shape {part.piece.shape}, the model needs "
                f"{own.shape}"
            )
        copied += _copy_overlap(own, part.piece)
    if copied != own.tensor.numel():
        raise ValueError(
            f"{stored[0].path.parent}: {copied:,} elements of {stored[0].name} are stored where "
            f"{own.tensor.numel():,} are needed"
        )


def _copy_overlap(target: Piece, source: Piece) -> int:
    """Copy the overlap of two pieces of a tensor; return its number of elements."""
    begin = [max(pair) for pair in zip(target.offsets, source.offsets, strict=True)]
    ends = [
        min(t + t_size, s + s_size)
        for t, t_size, s, s_size in zip(
            target.offsets, target.tensor.shape, source.offsets, source.tensor.shape, strict=True
        )
    ]
    if any(end <= start for start, end in zip(begin, ends, strict=True)):
        return 0
    size = [end - start for start, end in zip(begin, ends, strict=True)]

    def box(piece: Piece) -> torch.Tensor:
        offsets = [start - offset for start, offset in zip(begin, piece.offsets, strict=True)]
        return piece.tensor[box_slices(offsets, size)]

    overlap = box(target)
    overlap.copy_(box(source))
    return overlap.numel()
