"""The on-disk format of shards and prepared folders: write them, read the manifest.

A shard NAME consists of `NAME.bin` (little-endian uint16 or uint32 ids), `NAME.ends.npy` (uint64
document ends) and `NAME.json` (counts, hashes), and of `NAME.loss` if there is a loss mask: a byte
per token, 1 where it counts as a target. The JSON is written last and commits the shard: a
shard without it does not exist. `manifest.json`, written last of all, lists the shards of each
split. A document may continue in the next shard; the first shard then has no end for it.
"""

import hashlib
from io import BytesIO
from pathlib import Path

import numpy as np
import xxhash

from pretrain_lib.data.tokens.manifests import FORMAT_VERSION, MANIFEST, Unprepared, parse_manifest
from pretrain_lib.data.tokens.unprepared import explain_unprepared
from pretrain_lib.files.writes import write_files, write_json

BLOCK_BYTES = 64 * 1024  # unit of checksums in a .bin, verified at the first read that touches it
SHARD_HASHES = {".bin": "sha256", ".ends.npy": "ends_sha256", ".json": "json_sha256"}
MASK_HASHES = {".loss": "loss_sha256"}


def token_dtype(vocabulary_size: int) -> np.dtype:
    """Return the smallest on-disk dtype that holds every id of a vocabulary."""
    return np.dtype("<u2" if vocabulary_size <= 2**16 else "<u4")


def write_shard(
    folder: Path,
    name: str,
    tokens: np.ndarray,
    ends: np.ndarray,
    *,
    text_bytes: int | None = None,
    mask: np.ndarray | None = None,
) -> dict:
    """Write one shard and return the content of its JSON.

    `tokens` are ids of the on-disk dtype, `ends` where those documents end that end in the shard,
    `text_bytes` is their UTF-8 size if known, `mask` which tokens count as targets: bool.
    """
    assert tokens.dtype.str in ("<u2", "<u4"), f"{tokens.dtype} is no dtype of shards"
    raw, npy = memoryview(tokens).cast("B"), _npy_bytes(ends.astype("<u8"))
    contents = {folder / f"{name}.bin": raw, folder / f"{name}.ends.npy": npy}
    if mask is not None:
        contents[folder / f"{name}.loss"] = masked = memoryview(mask.astype(np.uint8))
    write_files(contents)
    record = {
        "format_version": FORMAT_VERSION,
        "tokens": len(tokens),
        "documents": len(ends),
        "text_bytes": text_bytes,
        "dtype": tokens.dtype.str,
        "lowest_id": int(tokens.min()) if len(tokens) else None,
        "highest_id": int(tokens.max()) if len(tokens) else None,
        "sha256": hashlib.sha256(raw).hexdigest(),
        "ends_sha256": hashlib.sha256(npy).hexdigest(),
        "blocks_xxh3_64": _hash_blocks(raw),
    }
    if mask is not None:
        record |= {"counted_tokens": int(mask.sum())}
        record |= {"loss_sha256": hashlib.sha256(masked).hexdigest()}
        record |= {"loss_blocks_xxh3_64": _hash_blocks(masked)}
    write_json(folder / f"{name}.json", record)
    return record


def _hash_blocks(raw: memoryview) -> list[str]:
    starts = range(0, len(raw), BLOCK_BYTES)
    return [xxhash.xxh3_64_hexdigest(raw[start : start + BLOCK_BYTES]) for start in starts]


def _npy_bytes(array: np.ndarray) -> bytes:
    buffer = BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def read_manifest(folder: Path) -> dict:
    """Return the manifest of a prepared folder; raises Unprepared for others, or ValueError."""
    path = folder / MANIFEST
    if isinstance(folder, Path) and not folder.exists():
        raise Unprepared(f"data.path={folder}: there is no such folder")
    if not path.is_file():
        raise Unprepared(f"data.path={folder} holds no {MANIFEST}: {explain_unprepared(folder)}")
    return parse_manifest(path)
