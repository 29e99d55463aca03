"""Tokens on disk: shards, written and read, and several files as one array.

A shard NAME is `NAME.bin` (little-endian uint16 or uint32 ids), `NAME.ends.npy` (uint64: where each
document ends) and `NAME.json` (counts, hashes), written last: a shard without it does not exist.
`manifest.json`, written last of all, names the shards of each split. Floor 0.
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np
import xxhash

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LOCK, LOCK_ATTEMPTS = ".lock", 5
BLOCK_BYTES = 64 * 1024  # of a .bin, checked as one at the first read that touches it
SHARD_HASHES = {".bin": "sha256", ".ends.npy": "ends_sha256", ".json": "json_sha256"}


def token_dtype(vocabulary_size: int) -> np.dtype:
    """Return the narrowest dtype on disk that holds every id of a vocabulary."""
    return np.dtype("<u2" if vocabulary_size <= 2**16 else "<u4")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that after a crash it is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, value: object) -> None:
    """Write `value` as JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


@contextmanager
def lock_folder(folder: Path, *, setting: str) -> Iterator[None]:
    """Make and hold a folder; raises ValueError, naming `setting`, if it cannot be had."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise ValueError(f"{setting}={folder} cannot be written: {error}") from error
    with lock:
        for attempt in range(LOCK_ATTEMPTS):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if attempt == LOCK_ATTEMPTS - 1:
                    raise ValueError(
                        f"{setting}={folder} is in use by another process; wait for it, or give "
                        f"another folder"
                    ) from error
                time.sleep(0.1)  # a process that only looks whether it is locked lets go at once
        yield


def write_shard(
    folder: Path, name: str, documents: Sequence[np.ndarray], *, dtype: np.dtype, text_bytes: int
) -> dict:
    """Write one shard and return the content of its JSON.

    `documents` are integer arrays of ids; `text_bytes` is the size of their UTF-8 text.
    """
    tokens = np.concatenate(documents) if documents else np.empty(0, dtype=np.int64)
    assert not len(tokens) or 0 <= tokens.min() <= tokens.max() <= np.iinfo(dtype).max
    ends = np.cumsum([len(document) for document in documents], dtype="<u8")
    raw, npy = tokens.astype(dtype).tobytes(), _npy_bytes(ends)
    write_atomically(folder / f"{name}.bin", raw)
    write_atomically(folder / f"{name}.ends.npy", npy)
    record = {
        "format_version": FORMAT_VERSION,
        "tokens": len(tokens),
        "documents": len(documents),
        "text_bytes": text_bytes,
        "dtype": dtype.str,
        "lowest_id": int(tokens.min()) if len(tokens) else None,
        "highest_id": int(tokens.max()) if len(tokens) else None,
        "sha256": hashlib.sha256(raw).hexdigest(),
        "ends_sha256": hashlib.sha256(npy).hexdigest(),
        "blocks_xxh3_64": [
            xxhash.xxh3_64_hexdigest(raw[start : start + BLOCK_BYTES])
            for start in range(0, len(raw), BLOCK_BYTES)
        ],
    }
    write_json(folder / f"{name}.json", record)
    return record


def _npy_bytes(array: np.ndarray) -> bytes:
    buffer = BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


@dataclass
class TokenFile:
    """One file of ids: a shard written here, or an array that others wrote."""

    path: Path
    num_tokens: int
    dtype: np.dtype
    header_bytes: int = 0
    is_shard: bool = False
    _checked: set[int] = field(default_factory=set, repr=False)

    @cached_property
    def _record(self) -> dict:
        return json.loads(self.path.with_suffix(".json").read_text())

    @cached_property
    def document_ends(self) -> np.ndarray:
        """Where each document ends, uint64 `(documents,)`; empty for a foreign array."""
        if not self.is_shard:
            return np.empty(0, dtype=np.uint64)
        path = self.path.with_suffix(".ends.npy")
        raw = path.read_bytes()
        if hashlib.sha256(raw).hexdigest() != self._record["ends_sha256"]:
            raise ValueError(f"{path}: the data differ from what was written; prepare it again")
        return np.load(BytesIO(raw), allow_pickle=False)

    def read(self, start: int, count: int) -> np.ndarray:
        """Return ids `[start, start + count)`; raises ValueError if a block was damaged."""
        first_byte = self.header_bytes + start * self.dtype.itemsize
        last_byte = first_byte + count * self.dtype.itemsize
        begin, end = first_byte, last_byte
        blocks = range(first_byte // BLOCK_BYTES, -(-last_byte // BLOCK_BYTES))
        unchecked = self.is_shard and not self._checked.issuperset(blocks)
        if unchecked:  # whole blocks, since their checksums are of the whole
            begin, end = blocks.start * BLOCK_BYTES, blocks.stop * BLOCK_BYTES
        with self.path.open("rb", buffering=0) as file:
            raw = os.pread(file.fileno(), end - begin, begin)
        if unchecked:
            self._check(raw, blocks.start)
        return np.frombuffer(raw[first_byte - begin : last_byte - begin], dtype=self.dtype)

    def _check(self, raw: bytes, first_block: int) -> None:
        for i in range(0, len(raw), BLOCK_BYTES):
            block = first_block + i // BLOCK_BYTES
            if (
                xxhash.xxh3_64_hexdigest(raw[i : i + BLOCK_BYTES])
                != self._record["blocks_xxh3_64"][block]
            ):
                raise ValueError(
                    f"{self.path}, block {block} (bytes {block * BLOCK_BYTES} and on): the data "
                    f"differ from what was written; prepare the folder again"
                )
            self._checked.add(block)


class TokenArray:
    """One split as one long array of ids, whatever files it lies in.

    `vocabulary_size`, when given, is checked on every read of a file that others wrote.
    """

    def __init__(self, files: Sequence[TokenFile], *, vocabulary_size: int | None = None) -> None:
        self.files = [file for file in files if file.num_tokens]
        self.vocabulary_size = vocabulary_size
        self._ends = np.cumsum([file.num_tokens for file in self.files], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def has_documents(self) -> bool:
        """Whether it is known where documents end."""
        return all(file.is_shard for file in self.files)

    def read(self, start: int, count: int) -> np.ndarray:
        """Return ids `[start, start + count)` as int64 `(count,)`."""
        assert start >= 0 and start + count <= len(self), f"{start}+{count} is outside the array"
        parts = [file.read(low, high - low) for file, low, high, _ in self._overlaps(start, count)]
        tokens = np.concatenate([np.empty(0, dtype=np.int64), *parts]).astype(np.int64)
        if self.vocabulary_size is not None and count:
            lowest, highest = int(tokens.min()), int(tokens.max())
            if lowest < 0 or highest >= self.vocabulary_size:
                raise ValueError(
                    f"token id {lowest if lowest < 0 else highest} in {self.files[0].path} "
                    f"(tokens {start} to {start + count}) is outside the vocabulary of "
                    f"{self.vocabulary_size}; set model.vocabulary_size to that of the tokenizer "
                    f"which made the file"
                )
        return tokens

    def document_ends(self, start: int, count: int) -> np.ndarray:
        """Return where documents end within `[start, start + count)`, relative to `start`.

        Each is the index after a document's last token: int64, rising, in `(0, count)`.
        """
        found = []
        for file, low, high, base in self._overlaps(start, count):
            ends = file.document_ends
            # In the dtype of the table, or numpy would copy the table to compare.
            first, last = np.searchsorted(ends, np.array([low, high], ends.dtype), side="right")
            found.append(ends[first:last].astype(np.int64) + base - start)
        ends = np.concatenate(found) if found else np.empty(0, dtype=np.int64)
        return ends[(ends > 0) & (ends < count)]

    def _overlaps(self, start: int, count: int) -> list[tuple[TokenFile, int, int, int]]:
        """Return `(file, low, high, base)` for every file that `[start, start + count)` touches.

        `[low, high)` is the part within the file, `base` the place of its first token.
        """
        overlaps, position, end = [], start, start + count
        index = int(np.searchsorted(self._ends, start, side="right"))
        while position < end:
            file = self.files[index]
            base = int(self._ends[index]) - file.num_tokens
            high = min(end - base, file.num_tokens)
            overlaps.append((file, position - base, high, base))
            position, index = base + high, index + 1
        return overlaps


def open_split(folder: Path, split: str) -> TokenArray:
    """Open the `train` or `validation` split of a prepared folder, checking sizes, not hashes."""
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


def read_manifest(folder: Path) -> dict:
    """Return the manifest of a prepared folder."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"data.path={folder} holds no {MANIFEST}: it is not a prepared folder, or `pretrain "
            f"prepare` did not finish; run it (again) on this folder"
        )
    manifest = json.loads(path.read_text())
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version={manifest.get('format_version')} is not the "
            f"{FORMAT_VERSION} that this version reads"
        )
    return manifest


def verify_folder(folder: Path) -> list[str]:
    """Check every hash of a prepared folder and return what is wrong, one line a file."""
    manifest, problems = read_manifest(folder), []
    expected = {
        f"tokenizer/{Path(name).name}": sha256
        for name, sha256 in manifest["tokenizer_files"].items()
    }
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            name = Path(shard["name"]).name
            expected |= {f"{name}{suffix}": shard[key] for suffix, key in SHARD_HASHES.items()}
    for name, sha256 in expected.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path}: missing")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            problems.append(f"{path}: its bytes differ from the manifest's hash")
    return problems
