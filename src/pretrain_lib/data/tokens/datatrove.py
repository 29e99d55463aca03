"""Token arrays of datatrove: a `.ds` of ids with its `.index` of document ends."""

import re

import numpy as np

from pretrain_lib.data.tokens.arrays import TokenFile
from pretrain_lib.data.tokens.ends import EndsTable
from pretrain_lib.data.tokens.headerless import SMALL, IdType, find_longer, sample
from pretrain_lib.data.tokens.places import Place, open_handle

FEWEST_BYTES = 64  # of which the values tell 2-byte ids from 4-byte ids


def open_datatrove(path: Place, dtype: IdType | None) -> TokenFile:
    """Open a datatrove file with its index of document ends, and its loss mask if there is one.

    The last document end is the number of tokens, which tells 2-byte ids from 4-byte ids. Where
    neither metadata nor `dtype` confirms it, the values must allow it: an index may lack its end.
    """
    index, size = path.with_name(f"{path.name}.index"), path.stat().st_size
    if not index.is_file():
        raise ValueError(f"{path}: its index {index.name} is missing")
    with index.open("rb") as file:
        file.seek(max(0, index.stat().st_size - 8))
        last = int.from_bytes(file.read(8), "little")
    if size == index.stat().st_size == 0:  # of a process that had no documents
        return TokenFile(path, 0, np.dtype("<u2"), foreign_ends=EndsTable(index))
    bytes_per_id, stated = size // last if last else 0, _stated_bytes(path)
    if bytes_per_id not in (2, 4) or size % last or index.stat().st_size % 8:
        raise ValueError(f"{path}: {size} bytes do not fit the documents that {index.name} lists")
    if stated not in (None, bytes_per_id):
        raise ValueError(
            f"{path}: {size} bytes are {bytes_per_id} for each of the {last} ids that {index.name} "
            f"lists, but {path.name}.metadata says {stated}; copy or write the files again"
        )
    is_stated = stated is not None or dtype == f"uint{8 * bytes_per_id}"
    if not is_stated and not _allow(path, size, bytes_per_id):
        raise ValueError(
            f"{path}: {size} bytes are {bytes_per_id} for each of the {last} ids that {index.name} "
            f"lists, but the values are those of {6 - bytes_per_id}-byte ids; copy or write both "
            f"files again, or give data.dtype=uint{8 * bytes_per_id} if they are right"
        )
    mask = path.with_name(f"{path.name}.loss")
    if mask.is_file() and mask.stat().st_size != last:
        raise ValueError(
            f"{mask}: {mask.stat().st_size} bytes, but {path.name} has {last} tokens, one byte "
            f"each; write it again, or remove it to count every token"
        )
    return TokenFile(
        path,
        last,
        np.dtype(f"<u{bytes_per_id}"),
        foreign_ends=EndsTable(index),
        mask=open_handle(mask) if mask.is_file() else None,
    )


def _stated_bytes(path: Place) -> int | None:
    """Return how many bytes an id has by datatrove's metadata, None if they do not say it."""
    metadata = path.with_name(f"{path.name}.metadata")
    if not metadata.is_file():
        return None
    found = re.match(rb"[^\n]*\|(\d+)\n", metadata.read_bytes())
    return int(found[1]) if found else None


def _allow(path: Place, size: int, bytes_per_id: int) -> bool:
    """Return whether a sample of a file may be ids of that many bytes."""
    samples = sample(path, size)
    if bytes_per_id == 2:
        return size < FEWEST_BYTES or find_longer(samples, "<") is None
    return all(np.frombuffer(part, "<u4").max() < (SMALL + 1) << 16 for part in samples)
