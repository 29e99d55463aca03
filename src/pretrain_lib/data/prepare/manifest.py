"""The manifest of a prepared folder: a record of its content, written last."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from pretrain_lib.data.prepare.groups import Report
from pretrain_lib.data.prepare.job import TOKENIZER_FOLDER, Job
from pretrain_lib.data.text.encoder import Encoder
from pretrain_lib.data.tokens.shards import FORMAT_VERSION, MANIFEST, SHARD_HASHES, write_json


def write_manifest(
    job: Job,
    folder: Path,
    encoder: Encoder,
    splits: dict[str, dict],
    report: Report,
    *,
    fingerprint: str,
) -> None:
    """Write `manifest.json`, which commits the folder."""
    tokenizer = encoder.tokenizer
    write_json(
        folder / MANIFEST,
        {
            "format_version": FORMAT_VERSION,
            "sources": job.source_names(),
            "validation": job.validation,
            "dtype": encoder.dtype.str,
            "tokenizer_sha256": tokenizer.sha256,
            "tokenizer_files": {
                path.name: hashlib.sha256(path.read_bytes()).hexdigest()
                for path in sorted((folder / TOKENIZER_FOLDER).iterdir())
            },
            "vocabulary_size": tokenizer.vocabulary_size,
            "end_of_text_id": tokenizer.end_of_text_id,
            "encoder": "tokenizers" if encoder.fast is None else "tiktoken",
            "splits": splits,
            "left_out": asdict(report),
            "fingerprint": fingerprint,
        },
    )


def summarize(folder: Path, names: list[str]) -> dict:
    """Return the manifest's entry for a split: totals, and the counts and hashes of each shard."""
    records = []
    for name in names:
        raw = (folder / f"{name}.json").read_bytes()
        own_hash = {SHARD_HASHES[".json"]: hashlib.sha256(raw).hexdigest()}
        records.append(json.loads(raw) | own_hash | {"name": name})
    totals = ("tokens", "documents", "text_bytes")
    kept = ("name", *totals, *SHARD_HASHES.values())
    filled = [record for record in records if record["tokens"]]
    return {
        **{key: sum(record[key] for record in records) for key in totals},
        "lowest_id": min((record["lowest_id"] for record in filled), default=None),
        "highest_id": max((record["highest_id"] for record in filled), default=None),
        "shards": [{key: record[key] for key in kept} for record in records],
    }
