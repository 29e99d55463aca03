"""The manifest of a prepared folder: a record of its content, written last."""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from pretrain_lib.data.prepare.job import TOKENIZER_FOLDER, Job
from pretrain_lib.data.prepare.left_out import Report
from pretrain_lib.data.text.encoder import Encoder
from pretrain_lib.data.tokens.manifests import (
    FILES,
    FORMAT_VERSION,
    MANIFEST,
    MASKED_VERSION,
    REMEDY,
    manifest_bytes,
)
from pretrain_lib.data.tokens.shards import MASK_HASHES, SHARD_HASHES, read_manifest
from pretrain_lib.files.reading import interpreting, read_object
from pretrain_lib.files.writes import write_atomically

SHARD_COUNTS = ("tokens", "documents", "text_bytes")
COMMITTED = ("job.json", "unit-*.json", "spool.json")  # what stays as it is, beside the shards


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
    manifest = {
        "format_version": FORMAT_VERSION if job.loss_spans is None else MASKED_VERSION,
        "sources": job.source_names(),
        "validation": job.validation,
        **({} if job.loss_spans is None else {"loss_spans": job.loss_spans}),
        "dtype": encoder.dtype.str,
        "tokenizer_sha256": tokenizer.sha256,
        "tokenizer_files": _hashes((folder / TOKENIZER_FOLDER).iterdir()),
        "vocabulary_size": tokenizer.vocabulary_size,
        "end_of_text_id": tokenizer.end_of_text_id,
        "encoder": encoder.package,
        "splits": splits,
        "left_out": asdict(report),
        "fingerprint": fingerprint,
        FILES: _hashes(path for kind in COMMITTED for path in folder.glob(kind)),
    }
    write_atomically(folder / MANIFEST, manifest_bytes(manifest))


def _hashes(paths: Iterable[Path]) -> dict[str, str]:
    """Return the sha256 of files by their names, in order; hidden files are not ours."""
    visible = sorted(path for path in paths if not path.name.startswith("."))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in visible}


def update_left_out(folder: Path, report: Report) -> None:
    """Write into the manifest of a spool what was left out of its source, as far as it was read."""
    manifest = read_manifest(folder)
    before, new = manifest["left_out"], asdict(report)
    counts = ("empty", "rejected")
    if sum(new[key] for key in counts) > sum(before[key] for key in counts) or (
        len(new["reasons"]) > len(before["reasons"])
    ):
        new["skipped_files"] = before["skipped_files"]
        write_atomically(folder / MANIFEST, manifest_bytes(manifest | {"left_out": new}))


def _shard_record(path: Path) -> dict:
    """Return the content of the JSON of a shard, with its own hash."""
    try:
        record, sha256 = read_object(path, remedy=REMEDY), hashlib.sha256(path.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing, though a unit lists it; {REMEDY}") from error
    kinds = dict.fromkeys(SHARD_COUNTS, int) | dict.fromkeys(("sha256", "ends_sha256"), str)
    kinds |= dict.fromkeys(("lowest_id", "highest_id"), int if record.get("tokens") else object)
    with interpreting(path, remedy=REMEDY):
        for name, kind in kinds.items():
            if not isinstance(record[name], kind):
                raise TypeError(f"{name}={record[name]!r}")
    return record | {SHARD_HASHES[".json"]: sha256.hexdigest()}


def summarize(folder: Path, names: list[str]) -> dict:
    """Return the manifest's entry for a split: totals, and the counts and hashes of each shard."""
    records = []
    for name in names:
        records.append(_shard_record(folder / f"{name}.json") | {"name": name})
    is_masked = any("loss_sha256" in record for record in records)
    totals = (*SHARD_COUNTS, *(("counted_tokens",) if is_masked else ()))
    masks = MASK_HASHES.values() if is_masked else ()
    keys = ("name", *totals, *SHARD_HASHES.values(), *masks)
    filled = [record for record in records if record["tokens"]]
    return {
        **{key: sum(record[key] for record in records) for key in totals},
        "lowest_id": min((record["lowest_id"] for record in filled), default=None),
        "highest_id": max((record["highest_id"] for record in filled), default=None),
        "shards": [{key: record[key] for key in keys} for record in records],
    }
