"""Shuffle a range with a keyed permutation, computed index by index without storing it.

`prepare` shuffles documents with it, and training shuffles windows.
"""

import hashlib

import numpy as np

ORDER_VERSION = 1
FEISTEL_ROUNDS = 6


def derive_keys(*parts: object) -> np.ndarray:
    """Return the Feistel round keys derived from `parts`: uint64, `(FEISTEL_ROUNDS,)`."""
    text = "|".join(["pretrain_lib.order", str(ORDER_VERSION), *map(str, parts)])
    digest = hashlib.blake2b(text.encode(), digest_size=8 * FEISTEL_ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _scramble(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """Hash uint64 `values` with `key` (the SplitMix64 finalizer, Steele et al. 2014)."""
    x = values + key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(
    indices: np.ndarray, *, size: int, keys: np.ndarray, inverse: bool = False
) -> np.ndarray:
    """Apply the permutation of `range(size)` selected by `keys`, or its inverse, to `indices`.

    A balanced Feistel network permutes the range up to the next power of four. A result of `size`
    or more is permuted again until it is below `size` ("cycle walking", Black and Rogaway 2002),
    which keeps the map a bijection. Takes O(len(indices)) time and memory, whatever `size` is.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    result = np.asarray(indices, dtype=np.uint64).copy()
    assert not len(result) or int(result.max()) < size, "an index is outside the permutation"
    outside = np.arange(len(result))
    while len(outside):
        left, right = result[outside] >> half, result[outside] & mask
        for key in keys[::-1] if inverse else keys:
            if inverse:
                left, right = right ^ (_scramble(left, key) & mask), left
            else:
                left, right = right, left ^ (_scramble(right, key) & mask)
        result[outside] = (left << half) | right
        outside = outside[result[outside] >= np.uint64(size)]
    return result.astype(np.int64)
