"""Arrays of bare ids, whose type nothing in the file says: `.bin` of nanoGPT, `.npy` of OLMo."""

from typing import Literal

import numpy as np

from pretrain_lib.data.tokens.arrays import TokenFile
from pretrain_lib.data.tokens.places import Place

IdType = Literal["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]
SAMPLES, SAMPLE_BYTES = 64, 4096
SMALL = 15  # the upper half of ids of vocabularies of up to 2**20
TEXT_BYTES = [*b"\t\n\r", *range(0x20, 0x7F)]


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
    """Raise ValueError if the values may be those of longer ids, or of text.

    Read as uint16, longer ids are pairs of which one half is always zero, always small, or -1 where
    the id is negative.
    """
    pairs = _sample(path, size)
    if not len(pairs):
        return
    signed = pairs.view("<i2")
    lowest, highest = signed.min(axis=0), signed.max(axis=0)
    is_zero = (lowest == 0) & (highest == 0)
    is_small = (lowest >= -1) & (highest <= SMALL)
    has_negative = is_small[1] and lowest[1] == -1
    if is_zero.any() or has_negative or (is_small[1] and not is_small[0]):
        half = "zero" if is_zero.any() else f"between {-1 if has_negative else 0} and {SMALL}"
        raise ValueError(
            f"{path} has no header, and every second uint16 of it is {half}, as in ids of 4 or 8 "
            f"bytes: give data.dtype={_longer_type(pairs, is_signed=has_negative)}, or "
            f"data.dtype=uint16 if they are of 2 bytes"
        )
    if np.isin(pairs.view("u1"), TEXT_BYTES).all():
        raise ValueError(
            f"{path} holds text: tokenize it by `pretrain prepare`, or give data.dtype=uint16 if "
            f"it holds ids"
        )


def _longer_type(pairs: np.ndarray, *, is_signed: bool) -> str:
    """Return the type of the longer ids that pairs of uint16 may be the halves of."""
    every_second = pairs.copy().view("<u4").reshape(-1)[1::2]
    if len(every_second) and np.isin(every_second, (0, 2**32 - 1)).all():
        return "int64"  # of which these are the upper halves
    return "int32" if is_signed else "uint32"


def _sample(path: Place, size: int) -> np.ndarray:
    """Return pairs of uint16 from evenly spaced places of a file: `(pairs, 2)`."""
    last, parts = max(0, size - SAMPLE_BYTES), []
    with path.open("rb") as file:
        for start in sorted({last * i // (SAMPLES - 1) // 8 * 8 for i in range(SAMPLES)}):
            file.seek(start)
            raw = file.read(SAMPLE_BYTES)
            parts.append(np.frombuffer(raw[: len(raw) // 4 * 4], dtype="<u2").reshape(-1, 2))
    return np.concatenate(parts)
