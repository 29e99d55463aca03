"""Pieces of tensors in files: any cut is read back by any other, and by torch's own reader."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import HuggingFaceStorageReader, load

from pretrain_lib.tensors.piece_files import fill_piece, read_pieces, write_pieces
from pretrain_lib.tensors.pieces import Piece, fill

SHAPES = st.sampled_from([(7,), (5, 3), (1, 4), (16, 2), (3, 2, 2)])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def cut(tensor, count):
    """Cut a tensor as FSDP2 does: by rows, as many for each but the last; some may get none."""
    rows, pieces, start = -(-len(tensor) // count), [], 0
    for part in tensor.split(rows):
        offsets = (start, *(0,) * (tensor.dim() - 1))
        pieces.append(Piece(part, offsets, tuple(tensor.shape)))
        start += len(part)
    return pieces


def write(folder, tensors, count):
    """Write tensors as so many processes would, and return what is read of it."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    held = {name: cut(tensor, count) for name, tensor in tensors.items()}
    for rank in range(count):
        pieces = {name: own[rank] for name, own in held.items() if rank < len(own)}
        if pieces:
            write_pieces(folder / f"model-{rank}.safetensors", pieces)
    return read_pieces(folder.glob("*.safetensors"))


def drawn(shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    SHAPES, st.integers(1, 6), st.integers(1, 6), st.sampled_from([torch.float32, torch.bfloat16])
)
def test_any_number_of_processes_reads_what_any_other_wrote(
    tmp_path_factory, shape, writers, readers, dtype
):
    whole = drawn(shape, dtype)
    stored = write(tmp_path_factory.getbasetemp() / "pieces", {"w": whole}, writers)
    for piece in cut(torch.zeros(shape, dtype=dtype), readers):
        fill_piece(piece, stored["w"])
        begin = piece.offsets[0]
        assert torch.equal(piece.tensor, whole[begin : begin + len(piece.tensor)])


def test_torch_reads_the_same_files(tmp_path):
    tensors = {"a": drawn((5, 3)), "b": drawn((7,))}
    write(tmp_path, tensors, 3)
    found = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    load(found, storage_reader=HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("wrong", ["lost", "twice", "shape"])
def test_a_piece_that_is_lost_or_there_twice_or_of_something_else_is_refused(tmp_path, wrong):
    stored = write(tmp_path, {"w": drawn((6, 2))}, 3)["w"]
    target = Piece(torch.zeros(6, 2), (0, 0), (6, 2))
    if wrong == "lost":
        del stored[1]
    elif wrong == "twice":
        stored.append(stored[1])
    else:
        target = Piece(torch.zeros(6, 3), (0, 0), (6, 3))
    expected = {"lost": "8 elements", "twice": "16 elements", "shape": r"needs \(6, 3\)"}
    with pytest.raises(ValueError, match=expected[wrong]):
        fill_piece(target, stored)


def test_what_is_filled_up_is_zero():
    table = torch.full((6, 2), torch.nan)
    fill(table, torch.ones(4, 2))
    assert torch.equal(table, torch.tensor([[1.0, 1.0]] * 4 + [[0.0, 0.0]] * 2))
