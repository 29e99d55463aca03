"""Arrays of bare ids, whose type nothing in the file says: `.bin` of nanoGPT, `.npy` of OLMo."""

from typing import Literal

import numpy as np

from pretrain_lib.data.tokens.arrays import TokenFile
from pretrain_lib.data.tokens.contents import refuse_container, refuse_values
from pretrain_lib.data.tokens.places import Place

IdType = Literal["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]
SAMPLES, SAMPLE_BYTES = 64, 4096
SMALL = 15  # the upper half of ids of vocabularies of up to 2**20
FEWEST_IDS, FEWEST_VALUES = 1024, 9  # for what the low and high bytes of ids tell
ASCII = 0x80


def open_headerless(path: Place, dtype: IdType | None) -> TokenFile:
    """Open an array of little-endian ids of `dtype`; None: of uint16, if the values allow it.

    Raises ValueError if the type is in doubt, or if the ids do not fill the file.
    """
    size = path.stat().st_size
    if dtype is None:
        refuse_container(path)
    if dtype is None and path.suffix.lower() == ".npy":
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
    return TokenFile(path, size // of.itemsize, of, is_assumed=dtype is None)


def _check_uint16(path: Place, size: int) -> None:
    """Raise ValueError if the values may be those of longer ids, or of no ids."""
    samples = sample(path, size)
    refuse_values(path, samples)
    for order in "<>":
        if (found := find_longer(samples, order)) is None:
            continue
        half, of = found
        big, remedy = "", f"give data.dtype={of.name}"
        if order == ">":
            big, new = "big-endian ", of.newbyteorder("<")
            remedy = (
                f"write them as little-endian, numpy.fromfile(FILE, '{of.str}')"
                f".astype('{new.str}').tofile(NEW), and give data.dtype={of.name}"
            )
        raise ValueError(
            f"{path} has no header, and every second uint16 of it is {half}, as in {big}ids of 4 "
            f"or 8 bytes: {remedy}, or data.dtype=uint16 if they are of 2 bytes"
        )
    _refuse_bytes(path, samples)


def _refuse_bytes(path: Place, samples: list[bytes]) -> None:
    """Raise ValueError if the bytes of a sample are ids of one byte, or of the other order."""
    raw = b"".join(part[: len(part) // 2 * 2] for part in samples)
    low, high = (np.frombuffer(raw, "u1")[half::2] for half in (0, 1))
    if _are_bytes(low, high):
        raise ValueError(
            f"{path} holds ids of one byte, by its values: give data.dtype=uint8, or "
            f"data.dtype=uint16 if they are of 2 bytes"
        )
    if _are_swapped(low, high):
        raise ValueError(
            f"{path} holds big-endian ids, by its values: write them as little-endian, "
            f"numpy.fromfile(FILE, '>u2').astype('<u2').tofile(NEW), or give data.dtype=uint16 if "
            f"they are"
        )


def _are_bytes(low: np.ndarray, high: np.ndarray) -> bool:
    """Return whether the bytes are one kind of number, below 128, rather than halves of ids.

    Of ids of 2 bytes the low halves take all values, unless the high ones are nearly always zero.
    """
    if len(low) < FEWEST_IDS or not 0 < high.max() < ASCII or low.max() >= ASCII:
        return False
    shares = [np.bincount(half, minlength=ASCII) / len(half) for half in (low, high)]
    return np.abs(shares[0] - shares[1]).sum() < 0.4 and (shares[1] > 0).sum() >= FEWEST_VALUES


def _are_swapped(low: np.ndarray, high: np.ndarray) -> bool:
    """Return whether the low bytes stop where those of a vocabulary do, and the high ones do not.

    A vocabulary of less than 61,440 ids has no high bytes from 0xF0 on, one of up to 256 only zero.
    """
    many = len(low) >= FEWEST_IDS and len(np.unique(high)) >= FEWEST_VALUES
    return many and (low.max() == 0 or (low.max() < 0xF0 and high.max() == 0xFF))


def find_longer(samples: list[bytes], order: str) -> tuple[str, np.dtype] | None:
    """Return what every second uint16 is, and the type of the longer ids that this may be.

    Read as uint16, longer ids are pairs of which the upper half is always zero, always small, or -1
    where the id is negative. `order` is that of their bytes: "<" or ">". None if they are not.
    """
    pairs = _pairs(samples, order)
    if not len(pairs):
        return None
    lowest, highest = pairs.min(axis=0), pairs.max(axis=0)
    is_zero = lowest[1] == highest[1] == 0
    is_small = (lowest >= -1) & (highest <= SMALL)
    is_signed = bool(is_small[1] and lowest[1] == -1)
    if not (is_zero or is_signed or (is_small[1] and not is_small[0])):
        return None
    half = "zero" if is_zero else f"between {-1 if is_signed else 0} and {SMALL}"
    upper = np.concatenate([_longer(part, order)[order == "<" :: 2] for part in samples])
    if len(upper) and np.isin(upper, (0, 2**32 - 1)).all():
        return half, np.dtype(f"{order}i8")
    return half, np.dtype(f"{order}{'i' if is_signed else 'u'}4")


def _pairs(samples: list[bytes], order: str) -> np.ndarray:
    """Return the lower and upper halves of the numbers of 4 bytes: int16, `(numbers, 2)`."""
    parts = [_longer(part, order) for part in samples]
    numbers = np.concatenate([np.empty(0, "<u4"), *parts]).astype("<u4")
    return numbers.view("<i2").reshape(-1, 2)


def _longer(part: bytes, order: str) -> np.ndarray:
    return np.frombuffer(part[: len(part) // 4 * 4], f"{order}u4")


def sample(path: Place, size: int) -> list[bytes]:
    """Return bytes from evenly spaced places of a file."""
    last, samples = max(0, size - SAMPLE_BYTES), []
    with path.open("rb") as file:
        for start in sorted({last * i // (SAMPLES - 1) // 8 * 8 for i in range(SAMPLES)}):
            file.seek(start)
            samples.append(file.read(SAMPLE_BYTES))
    return samples
