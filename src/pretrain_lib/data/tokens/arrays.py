"""Read the token ids of several files as one long array."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np
import xxhash

from pretrain_lib.data.tokens.handle import Handle
from pretrain_lib.data.tokens.shards import BLOCK_BYTES, read_manifest

ENDS_PER_FENCE = 256


class EndsTable:
    """The document ends of a file, read from disk; memory holds one in `ENDS_PER_FENCE`."""

    def __init__(self, path: Path, *, sha256: str | None = None) -> None:
        """Open a `.npy` or raw uint64 file; raises ValueError if `sha256` does not match."""
        raw = path.read_bytes()
        if sha256 is not None and hashlib.sha256(raw).hexdigest() != sha256:
            raise ValueError(
                f"{path}: the data differ from what was written; prepare the folder again"
            )
        if path.suffix == ".npy":
            ends = np.load(BytesIO(raw), allow_pickle=False)
        else:
            ends = np.frombuffer(raw, dtype="<u8")
        self.count, self._handle = len(ends), Handle(path)
        self._header_bytes = len(raw) - ends.nbytes
        self._fences: list[int] = ends[::ENDS_PER_FENCE].tolist()

    def between(self, low: int, high: int) -> np.ndarray:
        """Return the ends in `(low, high]`, int64, ascending."""
        first = max(0, bisect_right(self._fences, low) - 1) * ENDS_PER_FENCE
        last = min(bisect_right(self._fences, high) * ENDS_PER_FENCE, self.count)
        raw = self._handle.read(self._header_bytes + 8 * first, 8 * (last - first))
        ends = np.frombuffer(raw, dtype="<i8")
        return ends[slice(*ends.searchsorted((low + 1, high + 1)).tolist())]


@dataclass
class TokenFile:
    """A file of token ids: a shard of a prepared folder, or an array written by another project."""

    path: Path
    num_tokens: int
    dtype: np.dtype
    header_bytes: int = 0
    is_shard: bool = False
    ends_file: Path | None = None
    """The file of document ends of a foreign array; None for a shard, which has its own."""
    _checked: bytearray = field(default_factory=bytearray, repr=False)

    @property
    def has_documents(self) -> bool:
        """Whether document ends are known."""
        return self.is_shard or self.ends_file is not None

    @cached_property
    def _handle(self) -> Handle:
        return Handle(self.path)

    @cached_property
    def ends(self) -> EndsTable:
        """The document ends."""
        if self.ends_file is not None:
            return EndsTable(self.ends_file)
        path, record = self.path.with_suffix(".ends.npy"), self._read_record()
        return EndsTable(path, sha256=record["ends_sha256"])

    @cached_property
    def _checksums(self) -> np.ndarray:
        """The xxh3_64 of each block of a shard."""
        hashes = self._read_record()["blocks_xxh3_64"]
        self._checked = bytearray(len(hashes))
        return np.frombuffer(bytes.fromhex("".join(hashes)), dtype=">u8")

    def _read_record(self) -> dict:
        return json.loads(self.path.with_suffix(".json").read_text())

    def read(self, start: int, count: int) -> np.ndarray:
        """Return ids `[start, start + count)`; raises ValueError if a block is damaged."""
        first_byte = self.header_bytes + start * self.dtype.itemsize
        last_byte = first_byte + count * self.dtype.itemsize
        begin, end = first_byte, last_byte
        blocks = slice(first_byte // BLOCK_BYTES, -(-last_byte // BLOCK_BYTES))
        unchecked = self.is_shard and not (len(self._checksums) and all(self._checked[blocks]))
        if unchecked:  # read whole blocks, since a checksum covers a whole block
            begin, end = blocks.start * BLOCK_BYTES, blocks.stop * BLOCK_BYTES
        raw = self._handle.read(begin, end - begin)
        if unchecked:
            self._check(raw, blocks.start)
        return np.frombuffer(raw, dtype=self.dtype, count=count, offset=first_byte - begin)

    def _check(self, raw: bytes, first_block: int) -> None:
        for i in range(0, len(raw), BLOCK_BYTES):
            block = first_block + i // BLOCK_BYTES
            if xxhash.xxh3_64_intdigest(raw[i : i + BLOCK_BYTES]) != self._checksums[block]:
                raise ValueError(
                    f"{self.path}, block {block} (bytes {block * BLOCK_BYTES} and on): the data "
                    f"differ from what was written; prepare the folder again"
                )
            self._checked[block] = True


class TokenArray:
    """The token ids of several files as one long array.

    If `vocabulary_size` is given, every read checks that the ids are in `[0, vocabulary_size)` and
    raises ValueError otherwise.
    """

    def __init__(self, files: Sequence[TokenFile], *, vocabulary_size: int | None = None) -> None:
        self.files = [file for file in files if file.num_tokens]
        self.vocabulary_size = vocabulary_size
        self._ends = np.cumsum([file.num_tokens for file in self.files], dtype=np.int64).tolist()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def has_documents(self) -> bool:
        """Whether document ends are known."""
        return all(file.has_documents for file in self.files)

    def read(self, start: int, count: int) -> np.ndarray:
        """Return ids `[start, start + count)`: int64, `(count,)`."""
        tokens = np.empty(count, dtype=np.int64)
        self.read_into(start, tokens)
        return tokens

    def read_into(self, start: int, tokens: np.ndarray) -> None:
        """Fill `tokens` `(count,)` with the ids from `start` on."""
        count = len(tokens)
        assert start >= 0 and start + count <= len(self), f"{start}+{count} is outside the array"
        for file, low, high, base in self._overlaps(start, count):
            tokens[base + low - start : base + high - start] = file.read(low, high - low)
        if self.vocabulary_size is not None and count:
            self._check_ids(start, tokens)

    def _check_ids(self, start: int, tokens: np.ndarray) -> None:
        lowest, highest = int(tokens.min()), int(tokens.max())
        if lowest < 0 or highest >= self.vocabulary_size:
            path = self.files[bisect_right(self._ends, start)].path
            raise ValueError(
                f"token id {lowest if lowest < 0 else highest} in {path} (tokens {start} to "
                f"{start + len(tokens)} of the array) is outside the vocabulary of "
                f"{self.vocabulary_size}; set model.vocabulary_size to that of the tokenizer that "
                f"made the file"
            )

    def document_ends(self, start: int, count: int) -> np.ndarray:
        """Return the document ends within `[start, start + count)`, relative to `start`.

        An end is the index after a document's last token: int64, ascending, in `(0, count)`.
        """
        last = start + count - 1
        found = [
            file.ends.between(low, min(high, last - base)) + (base - start)
            for file, low, high, base in self._overlaps(start, count)
        ]
        return found[0] if len(found) == 1 else np.concatenate([np.empty(0, np.int64), *found])

    def iterate_ends(self) -> Iterator[np.ndarray]:
        """Yield the document ends of each file: int64 indices into the array, ascending."""
        for file, end in zip(self.files, self._ends, strict=True):
            yield file.ends.between(-1, file.num_tokens) + (end - file.num_tokens)

    def _overlaps(self, start: int, count: int) -> Iterator[tuple[TokenFile, int, int, int]]:
        """Yield `(file, low, high, base)` for every file that overlaps `[start, start + count)`.

        `[low, high)` is the overlap within the file, `base` the array index of its first token.
        """
        position, end = start, start + count
        index = bisect_right(self._ends, start)
        while position < end:
            file = self.files[index]
            base = self._ends[index] - file.num_tokens
            high = min(end - base, file.num_tokens)
            yield file, position - base, high, base
            position, index = base + high, index + 1


def open_split(folder: Path, split: str) -> TokenArray:
    """Open the `train` or `validation` split of a prepared folder, checking file sizes only.

    Raises ValueError if a shard is missing or has the wrong size.
    """
    manifest = read_manifest(folder)
    dtype = np.dtype(manifest["dtype"])
    files = []
    for shard in manifest["splits"][split]["shards"]:
        path = folder / f"{Path(shard['name']).name}.bin"
        size = path.stat().st_size if path.is_file() else None
        if size != shard["tokens"] * dtype.itemsize:
            raise ValueError(
                f"{path}: {'missing' if size is None else f'{size} bytes'}, expected "
                f"{shard['tokens'] * dtype.itemsize} bytes; prepare the folder again"
            )
        files.append(TokenFile(path, shard["tokens"], dtype, is_shard=True))
    return TokenArray(files)
