"""Arrays of bare ids, whose type nothing in the file says: `.bin` of nanoGPT, `.npy` of OLMo."""

from typing import Literal

import numpy as np

from pretrain_lib.data.tokens.arrays import TokenFile
from pretrain_lib.data.tokens.places import Place

IdType = Literal["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]
SAMPLES, SAMPLE_BYTES = 64, 4096
SMALL = 15  # the upper half of ids of vocabularies of up to 2**20


def open_headerless(path: Place, dtype: IdType | None) -> TokenFile:
    """Open an array of little-endian ids of `dtype`; None: of uint16, if the values allow it.

    Raises ValueError if the type is in doubt, or if the ids do not fill the file.
    """
    size = path.stat().st_size
    if dtype is None and path.suffix == ".npy":
        raise ValueError(
            f"{path} has no .npy header: if it holds bare ids, as OLMo and dolma write them, give "
            f"their type by data.dtype=uint16 or data.dtype=uint32"
        )
    of = np.dtype(dtype or "uint16").newbyteorder("<")
    if size % of.itemsize:
        raise ValueError(
            f"{path}: {size} bytes are not a whole number of {of.name} ids; give their type by "
            f"data.dtype=, or copy the file again"
        )
    if dtype is None:
        _check_uint16(path, size)
    return TokenFile(path, size // of.itemsize, of)


def _check_uint16(path: Place, size: int) -> None:
    """Raise ValueError if the values may be those of longer ids.

    Read as uint16, longer ids are pairs of which one half is always zero, or always small.
    """
    pairs = _sample(path, size)
    if not len(pairs):
        return
    lower, upper = pairs.max(axis=0).tolist()
    if upper == 0 or lower == 0 or upper <= SMALL < lower:
        as_uint32 = pairs.copy().view("<u4").reshape(-1)
        longer = "int64" if not as_uint32[1::2].any() and len(as_uint32) > 1 else "uint32"
        raise ValueError(
            f"{path} has no header, and every second uint16 of it is at most "
            f"{min(upper, lower)}, as in ids of 4 or 8 bytes: give data.dtype={longer}, or "
            f"data.dtype=uint16 if they are of 2 bytes"
        )


def _sample(path: Place, size: int) -> np.ndarray:
    """Return pairs of uint16 from evenly spaced places of a file: `(pairs, 2)`."""
    last, parts = max(0, size - SAMPLE_BYTES), []
    with path.open("rb") as file:
        for start in sorted({last * i // (SAMPLES - 1) // 8 * 8 for i in range(SAMPLES)}):
            file.seek(start)
            raw = file.read(SAMPLE_BYTES)
            parts.append(np.frombuffer(raw[: len(raw) // 4 * 4], dtype="<u2").reshape(-1, 2))
    return np.concatenate(parts)
