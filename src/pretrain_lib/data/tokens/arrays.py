"""Read the token ids of several files as one long array."""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np

from pretrain_lib.data.tokens.checked import CheckedHandle
from pretrain_lib.data.tokens.ends import EndsInMemory, EndsTable
from pretrain_lib.data.tokens.handle import Handle
from pretrain_lib.data.tokens.manifests import REMEDY
from pretrain_lib.data.tokens.places import Place, RemoteHandle, open_handle
from pretrain_lib.data.tokens.shards import read_manifest
from pretrain_lib.files.reading import interpreting, read_object
from pretrain_lib.values import check_value

MASK_STRETCH = 2**24
ASSUMED = "read as little-endian uint16, which is assumed"


@dataclass
class TokenFile:
    """A file of token ids: a shard of a prepared folder, or an array written by another project."""

    path: Place
    num_tokens: int
    dtype: np.dtype
    header_bytes: int = 0
    is_shard: bool = False
    is_assumed: bool = False
    """Whether nothing states the dtype."""
    record_sha256: str | None = None
    """The hash of a shard's JSON in the manifest; None for a segment of a stream."""
    foreign_ends: EndsTable | EndsInMemory | None = None
    """The document ends of a foreign array; None for a shard, which has its own."""
    mask: Handle | RemoteHandle | CheckedHandle | None = None
    """A file with one byte per token, 1 where it counts as a target; None if every one does."""

    @property
    def has_documents(self) -> bool:
        """Whether document ends are known."""
        return self.is_shard or self.foreign_ends is not None

    @cached_property
    def _handle(self) -> Handle | RemoteHandle | CheckedHandle:
        if not self.is_shard:
            return open_handle(self.path)
        hashes = partial(read_hashes, self.path, "blocks_xxh3_64", self.record_sha256)
        return CheckedHandle(self.path, hashes)

    @cached_property
    def ends(self) -> EndsTable | EndsInMemory:
        """The document ends."""
        if self.foreign_ends is not None:
            return self.foreign_ends
        sha256 = read_hashes(self.path, "ends_sha256", self.record_sha256)
        return EndsTable(self.path.with_suffix(".ends.npy"), sha256=sha256)

    def read(self, start: int, count: int) -> np.ndarray:
        """Return ids `[start, start + count)`; raises ValueError if a block is damaged."""
        size = self.dtype.itemsize
        raw = self._handle.read(self.header_bytes + start * size, count * size)
        if len(raw) < count * size:
            raise ValueError(
                f"{self.path} is shorter than when it was opened: tokens {start} to "
                f"{start + count} are not there; put the file back and start again"
            )
        return np.frombuffer(raw, dtype=self.dtype, count=count)

    def counts(self, start: int, count: int) -> np.ndarray:
        """Return which tokens `[start, start + count)` count as targets, by the mask: bool."""
        values = np.frombuffer(self.mask.read(start, count), dtype=np.uint8)
        if len(values) != count or values.max(initial=0) > 1:
            raise ValueError(
                f"{self.mask.path}: not a loss mask of one byte per token, 0 or 1, between tokens "
                f"{start} and {start + count}; write it again, or remove it to count every token"
            )
        return values.astype(bool)


def read_hashes(path: Place, kind: str, sha256: str | None) -> list[str] | str:
    """Return the hash or hashes of one kind that the JSON of the shard at `path` lists.

    Raises ValueError if the JSON does not have the hash `sha256`, unless that is None.
    """
    path = path.with_suffix(".json")
    if sha256 not in (None, hashlib.sha256(path.read_bytes()).hexdigest()):
        raise ValueError(
            f"{path}: its bytes differ from the manifest's hash; prepare the folder again"
        )
    with interpreting(path, remedy=REMEDY):
        return read_object(path, remedy=REMEDY)[kind]


class TokenArray:
    """The token ids of several files as one long array.

    If `vocabulary_size` is given, every read checks that the ids are in `[0, vocabulary_size)` and
    raises ValueError otherwise.
    """

    def __init__(self, files: Sequence[TokenFile], *, vocabulary_size: int | None = None) -> None:
        self.files = [file for file in files if file.num_tokens]
        self.vocabulary_size = vocabulary_size
        self.has_mask = any(file.mask is not None for file in self.files)
        self.is_assumed = any(file.is_assumed for file in self.files)
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

    def counts(self, start: int, count: int) -> np.ndarray | None:
        """Return which tokens `[start, start + count)` count as targets: bool, or None for all."""
        if not self.has_mask:
            return None
        counts = np.ones(count, dtype=bool)
        for file, low, high, base in self._overlaps(start, count):
            if file.mask is not None:
                counts[base + low - start : base + high - start] = file.counts(low, high - low)
        return counts

    def iterate_counted(self) -> Iterator[int]:
        """Yield the number of tokens that the masks count, for `MASK_STRETCH` tokens at a time."""
        assert self.has_mask, "without a mask every token counts"
        for start in range(0, len(self), MASK_STRETCH):
            yield int(self.counts(start, min(MASK_STRETCH, len(self) - start)).sum())

    def ignore_masked(self, targets: np.ndarray, start: int, ignored: int) -> None:
        """Set the `targets` `(n,)`, tokens from `start` on, that do not count to `ignored`."""
        counts = self.counts(start, len(targets))
        if counts is not None:
            targets[~counts] = ignored

    def _check_ids(self, start: int, tokens: np.ndarray) -> None:
        lowest, highest = int(tokens.min()), int(tokens.max())
        if lowest < 0 or highest >= self.vocabulary_size:
            file = self.files[bisect_right(self._ends, start)]
            doubt = f" ({ASSUMED}; data.dtype states another type)" if file.is_assumed else ""
            raise ValueError(
                f"token id {lowest if lowest < 0 else highest} in {file.path}{doubt} (tokens "
                f"{start} to {start + len(tokens)} of the array) is outside the vocabulary of "
                f"{self.vocabulary_size}; set model.vocabulary_size to that of the tokenizer that "
                f"made the file"
            )

    def document_ends(self, start: int, count: int) -> np.ndarray:
        """Return the document ends within `[start, start + count)`, relative to `start`.

        An end is the index after a document's last token: int64, strictly ascending, in
        `(0, count)`; empty documents have none.
        """
        last = start + count - 1
        parts = [
            file.ends.between(low, min(high, last - base)) + (base - start)
            for file, low, high, base in self._overlaps(start, count)
        ]
        ends = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.int64), *parts])
        # Empty documents end where the one before them does.
        return ends[np.diff(ends, prepend=-1) > 0] if len(ends) > 1 else ends

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


def open_split(folder: Place | str, split: str) -> TokenArray:
    """Open the `train` or `validation` split of a prepared folder, checking file sizes only.

    Raises ValueError if a shard is missing or has the wrong size.
    """
    folder = Path(folder) if isinstance(folder, str) else folder
    check_value(split, "split", Literal["train", "validation"])
    manifest = read_manifest(folder)
    dtype = np.dtype(manifest["dtype"])
    files, sizes = [], {path.name: path.stat().st_size for path in folder.glob("*.bin")}
    for shard in manifest["splits"][split]["shards"]:
        path = folder / f"{Path(shard['name']).name}.bin"
        size = sizes.get(path.name)
        if size != shard["tokens"] * dtype.itemsize:
            raise ValueError(
                f"{path}: {'missing' if size is None else f'{size} bytes'}, expected "
                f"{shard['tokens'] * dtype.itemsize} bytes; prepare the folder again"
            )
        sha256, mask = shard["json_sha256"], None
        if "loss_sha256" in shard:
            hashes = partial(read_hashes, path, "loss_blocks_xxh3_64", sha256)
            mask = CheckedHandle(path.with_suffix(".loss"), hashes)
        files.append(
            TokenFile(path, shard["tokens"], dtype, is_shard=True, record_sha256=sha256, mask=mask)
        )
    return TokenArray(files)
