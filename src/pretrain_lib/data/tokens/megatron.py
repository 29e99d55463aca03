"""Token arrays of Megatron-LM (MMapIndexedDataset, version 1): a `.bin` of ids and its `.idx`."""

import struct

import numpy as np

from pretrain_lib.data.tokens.arrays import TokenFile
from pretrain_lib.data.tokens.ends import EndsInMemory
from pretrain_lib.data.tokens.places import Place

HEADER = struct.Struct("<9sQBQQ")  # magic, version, type code, sequences, document indices
MAGIC, VERSION = b"MMIDIDX\x00\x00", 1
ID_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
FLOAT_TYPES = {6: "float64", 7: "float32"}


def open_megatron(path: Place, index: Place) -> TokenFile:
    """Open the ids of `path` with the documents that `index` lists.

    The index holds the lengths of the sequences, int32; where each begins in bytes, int64; and the
    number of sequences before each document, int64, ending with their total. Raises ValueError
    unless both files agree in every one of these.
    """
    raw = index.read_bytes()
    dtype, sequences, documents = _read_header(raw, index)
    needed = HEADER.size + 12 * sequences + 8 * documents
    if len(raw) != needed:
        _refuse(
            index,
            f"{len(raw)} bytes, but {sequences} sequences and {documents} document "
            f"indices need {needed}",
        )
    lengths = np.frombuffer(raw, "<i4", sequences, HEADER.size)
    starts = np.frombuffer(raw, "<i8", sequences, HEADER.size + 4 * sequences)
    firsts = np.frombuffer(raw, "<i8", documents, HEADER.size + 12 * sequences)
    if lengths.min(initial=0) < 0:
        _refuse(index, f"a sequence has {lengths.min()} tokens")
    bounds = np.append(0, np.cumsum(lengths, dtype=np.int64))
    if not np.array_equal(starts, bounds[:-1] * dtype.itemsize):
        _refuse(index, "its sequences do not begin where the ones before them end")
    expected = [0, sequences]
    if [*firsts[:1], *firsts[-1:]] != expected or (np.diff(firsts) < 0).any():
        _refuse(index, f"its document indices do not ascend from 0 to {sequences} sequences")
    size, num_tokens = path.stat().st_size, int(bounds[-1])
    if size != num_tokens * dtype.itemsize:
        raise ValueError(
            f"{path}: {size} bytes, but {index.name} lists {num_tokens} ids of {dtype.name}, "
            f"{num_tokens * dtype.itemsize} bytes; copy or write both files again"
        )
    return TokenFile(path, num_tokens, dtype, foreign_ends=EndsInMemory(bounds[firsts[1:]]))


def _read_header(raw: bytes, index: Place) -> tuple[np.dtype, int, int]:
    """Return the type of the ids, the number of sequences and that of document indices."""
    if len(raw) < HEADER.size or not raw.startswith(MAGIC):
        _refuse(index, "not an index of Megatron-LM, which decides how the .bin beside it is read")
    _, version, code, sequences, documents = HEADER.unpack_from(raw)
    if version != VERSION:
        _refuse(index, f"version {version} of Megatron-LM's index; only {VERSION} is supported")
    if code not in ID_TYPES:
        _refuse(index, f"type code {code} ({FLOAT_TYPES.get(code, 'unknown')}) is not of ids")
    return np.dtype(ID_TYPES[code]), sequences, documents


def _refuse(index: Place, reason: str) -> None:
    raise ValueError(f"{index}: {reason}; copy or write the .bin and its .idx again")
