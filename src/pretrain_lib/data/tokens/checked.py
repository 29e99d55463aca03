"""Read a file of a shard, and verify the checksum of each block at the first read that needs it."""

from collections.abc import Callable
from functools import cached_property

import numpy as np
import xxhash

from pretrain_lib.data.tokens.handle import Handle
from pretrain_lib.data.tokens.places import Place, RemoteHandle, open_handle
from pretrain_lib.data.tokens.shards import BLOCK_BYTES


class CheckedHandle:
    """A file for positioned reads from several threads, whose blocks have checksums."""

    def __init__(self, path: Place, read_hashes: Callable[[], list[str]]) -> None:
        """`read_hashes` returns the xxh3_64 of each block of `BLOCK_BYTES`, in hexadecimal."""
        self.path, self._read_hashes = path, read_hashes

    @cached_property
    def _handle(self) -> Handle | RemoteHandle:
        return open_handle(self.path)

    @cached_property
    def _checksums(self) -> np.ndarray:
        return np.frombuffer(bytes.fromhex("".join(self._read_hashes())), dtype=">u8")

    @cached_property
    def _checked(self) -> bytearray:
        return bytearray(len(self._checksums))

    def read(self, start: int, count: int) -> bytes:
        """Return bytes `[start, start + count)`; raises ValueError if a block is damaged."""
        first, last = start // BLOCK_BYTES, -(-(start + count) // BLOCK_BYTES)
        if all(self._checked[first:last]):
            return self._handle.read(start, count)
        # A checksum covers a whole block.
        raw = self._handle.read(first * BLOCK_BYTES, (last - first) * BLOCK_BYTES)
        self._check(raw, first)
        offset = start - first * BLOCK_BYTES
        return raw[offset : offset + count]

    def _check(self, raw: bytes, first_block: int) -> None:
        for i in range(0, len(raw), BLOCK_BYTES):
            block = first_block + i // BLOCK_BYTES
            if xxhash.xxh3_64_intdigest(raw[i : i + BLOCK_BYTES]) != self._checksums[block]:
                raise ValueError(
                    f"{self.path}, block {block} (bytes {block * BLOCK_BYTES} and on): the data "
                    f"differ from what was written; prepare the folder again"
                )
            self._checked[block] = True
