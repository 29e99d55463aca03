"""The on-disk format of shards and prepared folders: write, read the manifest, verify.

A shard NAME consists of `NAME.bin` (little-endian uint16 or uint32 ids), `NAME.ends.npy` (uint64
document ends) and `NAME.json` (counts, hashes). The JSON is written last and commits the shard: a
shard without it does not exist. `manifest.json`, written last of all, lists the shards of each
split. A document may continue in the next shard; the first shard then has no end for it.
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import xxhash

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
LOCK, LOCK_ATTEMPTS = ".lock", 5
BLOCK_BYTES = 64 * 1024  # unit of checksums in a .bin, verified at the first read that touches it
SHARD_HASHES = {".bin": "sha256", ".ends.npy": "ends_sha256", ".json": "json_sha256"}


def token_dtype(vocabulary_size: int) -> np.dtype:
    """Return the smallest on-disk dtype that holds every id of a vocabulary."""
    return np.dtype("<u2" if vocabulary_size <= 2**16 else "<u4")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file by fsync and atomic rename: after a crash it is complete or absent."""
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
    """Write `value` as JSON, atomically (`write_atomically`)."""
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


@contextmanager
def lock_folder(folder: Path, *, setting: str) -> Iterator[None]:
    """Create and lock a folder; raises ValueError, naming `setting`, if it cannot be locked."""
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
                time.sleep(0.1)  # a process that only tests the lock releases it at once
        yield


def write_shard(
    folder: Path,
    name: str,
    documents: Sequence[np.ndarray],
    *,
    dtype: np.dtype,
    text_bytes: int | None = None,
    last_ends: bool = True,
) -> dict:
    """Write one shard and return the content of its JSON.

    `documents` are integer arrays of ids. `last_ends` says whether the last document ends in this
    shard, `text_bytes` is the UTF-8 size of their text if known.
    """
    tokens = np.concatenate(documents) if documents else np.empty(0, dtype=dtype)
    assert not len(tokens) or 0 <= tokens.min() <= tokens.max() <= np.iinfo(dtype).max
    ends = np.cumsum([len(document) for document in documents], dtype="<u8")
    ends = ends if last_ends else ends[:-1]
    raw, npy = tokens.astype(dtype, copy=False).tobytes(), _npy_bytes(ends)
    write_atomically(folder / f"{name}.bin", raw)
    write_atomically(folder / f"{name}.ends.npy", npy)
    record = {
        "format_version": FORMAT_VERSION,
        "tokens": len(tokens),
        "documents": len(ends),
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


def read_manifest(folder: Path) -> dict:
    """Return the manifest of a prepared folder; raises ValueError if it is missing or outdated."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"data.path={folder} holds no {MANIFEST}: it is not a prepared folder, or `pretrain "
            f"prepare` did not finish; run `pretrain prepare` on it (again)"
        )
    manifest = json.loads(path.read_text())
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version={manifest.get('format_version')} is not supported, this "
            f"version reads {FORMAT_VERSION}; prepare the data again, into another folder"
        )
    return manifest


def verify_folder(folder: Path) -> list[str]:
    """Verify every hash of a prepared folder; return one line per missing or damaged file."""
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
