"""Source to shards: tokenised in units, each committed on its own, so a restart skips whole units.

The bytes written depend on the job (sources, tokenizer, split), never on the number of processes or
the order in which they finish. Floor 2.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pretrain_lib.data.holdout import HeldOut, hash_fraction, parse_validation, write_first_tokens
from pretrain_lib.data.order import derive_keys, permute
from pretrain_lib.data.shards import (
    FORMAT_VERSION,
    MANIFEST,
    SHARD_HASHES,
    lock_folder,
    read_manifest,
    token_dtype,
    write_atomically,
    write_json,
    write_shard,
)
from pretrain_lib.data.sources import Source, open_source
from pretrain_lib.data.tokenizer import (
    Tokenizer,
    check_vocabulary_size,
    load_tokenizer,
    train_tokenizer,
)

JOB = "job.json"
TOKENIZER_FOLDER = "tokenizer"
ENCODE_BATCH_BYTES = 2**20
TRAINING_TEXT_BYTES = 200 * 2**20  # at most so much text trains a tokenizer


@dataclass(frozen=True)
class Job:
    """What decides every byte of a prepared folder."""

    sources: tuple[str, ...]
    tokenizer: str | None = None  # folder, tokenizer.json or hub id
    train_tokenizer: int | None = None  # or: train one with so many ids
    validation: str = "hash"  # hash, hash:SHARE, first:TOKENS, or none
    text_field: str = "text"

    def __post_init__(self) -> None:
        if (self.tokenizer is None) == (self.train_tokenizer is None):
            raise ValueError(
                f"exactly one of tokenizer={self.tokenizer} and "
                f"train_tokenizer={self.train_tokenizer} must be given"
            )
        if self.train_tokenizer is not None:
            check_vocabulary_size(self.train_tokenizer)
        parse_validation(self.validation)

    def open_sources(self) -> list[Source]:
        """Open the sources, checking that they can be read."""
        return [open_source(name, text_field=self.text_field) for name in self.sources]

    def record(self) -> dict:
        """Return the job as stored beside the data and compared when it is run again."""
        tokenizer = f"trained, {self.train_tokenizer} ids"
        if self.tokenizer is not None:
            tokenizer = load_tokenizer(self.tokenizer).sha256
        return {
            "format_version": FORMAT_VERSION,
            "sources": [source.identity() for source in self.open_sources()],
            "tokenizer": tokenizer,
            "validation": self.validation,
            "text_field": self.text_field,
        }


def prepare(job: Job, folder: Path, *, workers: int = 1, quiet: bool = False) -> dict:
    """Tokenise a job's sources into `folder` and return its manifest; done already: only return.

    Killed at any instant and called again, it continues with the units that are not committed.
    Raises ValueError if the folder holds another job, or is being prepared by another process.
    """
    record = job.record()
    with lock_folder(folder, setting="data.path"):
        check_same_job(folder, record)
        if not _has_shards(folder):  # what an attempt left that failed before its first unit
            shutil.rmtree(folder / TOKENIZER_FOLDER, ignore_errors=True)
        if not (folder / MANIFEST).is_file():
            write_json(folder / JOB, record)
            _write_units(job, folder, workers=workers, quiet=quiet)
        return read_manifest(folder)


def check_same_job(folder: Path, record: dict) -> None:
    """Raise ValueError, naming the differences, if `folder` was prepared by another job."""
    if not (folder / JOB).is_file() or not _has_shards(folder):
        return
    before = json.loads((folder / JOB).read_text())
    differences = [
        f"{key}: {before.get(key)} there, {value} asked for"
        for key, value in record.items()
        if before.get(key) != value
    ]
    if differences:
        raise ValueError(
            f"data.path={folder} was prepared differently ({'; '.join(differences)}); give "
            f"another folder, or delete this one"
        )


def _has_shards(folder: Path) -> bool:
    return any(folder.glob("train-*.json")) or any(folder.glob("validation-*.json"))


def _write_units(job: Job, folder: Path, *, workers: int, quiet: bool) -> None:
    sources = job.open_sources()
    tokenizer = _write_tokenizer(job, sources, folder)
    units = [(s, u) for s, source in enumerate(sources) for u in range(len(source.units()))]
    held_out = write_first_tokens(job.validation, sources, units, tokenizer, folder)
    tasks = [(job, folder, index, *unit, held_out[index]) for index, unit in enumerate(units)]
    bar = tqdm(
        total=len(tasks),
        desc="preparing",
        unit="unit",
        disable=quiet or not sys.stderr.isatty(),
    )
    with bar, contextlib.ExitStack() as stack:
        run: Iterable = map(_write_unit, tasks)
        if workers > 1:
            # Spawned, because the Rust tokenizer's threads do not survive a fork.
            pool = ProcessPoolExecutor(
                workers, mp_context=get_context("spawn"), initializer=_end_with_parent
            )
            run = stack.enter_context(pool).map(_write_unit, tasks)
        for _ in run:
            bar.update()
    _write_manifest(job, folder, tokenizer, len(units))


def _end_with_parent() -> None:
    """End this worker as soon as its parent is gone, even if that was killed."""

    def wait() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _write_tokenizer(job: Job, sources: list[Source], folder: Path) -> Tokenizer:
    target = folder / TOKENIZER_FOLDER
    if target.is_dir():
        return load_tokenizer(target)
    if job.tokenizer is not None:
        tokenizer = load_tokenizer(job.tokenizer)
    else:
        tokenizer = train_tokenizer(
            _training_texts(sources), vocabulary_size=job.train_tokenizer or 0
        )
    staging = folder / f"{TOKENIZER_FOLDER}.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    tokenizer.save(staging)
    for path in list(staging.iterdir()):
        write_atomically(path, path.read_bytes())  # on disk before the name that says so
    staging.rename(target)
    return tokenizer


def _training_texts(sources: list[Source]) -> Iterator[str]:
    size = 0
    for source in sources:
        for unit in source.units():
            for text in source.documents(unit):
                yield text
                size += len(text)
                if size > TRAINING_TEXT_BYTES:
                    return


def _write_unit(task: tuple[Job, Path, int, int, int, HeldOut]) -> None:
    """Tokenise one unit into `train-INDEX` and, for `hash`, `validation-INDEX`."""
    job, folder, index, source_index, unit_index, held_out = task
    name = f"train-{index:05d}"  # written last, it commits the unit
    if (folder / f"{name}.json").is_file():
        return
    source = job.open_sources()[source_index]
    tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER)
    texts = list(source.documents(source.units()[unit_index]))[held_out.documents :]
    rest: list[np.ndarray] = []
    if held_out.tokens:
        rest = [tokenizer.encode_documents(texts[:1])[0][held_out.tokens :]]
        texts = texts[1:]
    texts = [text for text in texts if text.strip()]
    kind, share = parse_validation(job.validation)
    if kind == "hash":
        validation = [text for text in texts if hash_fraction(text) < share]
        texts = [text for text in texts if hash_fraction(text) >= share]
        _write_texts(folder, f"validation-{index:05d}", validation, tokenizer)
    _write_texts(folder, name, texts, tokenizer, before=rest)


def _write_texts(
    folder: Path,
    name: str,
    texts: list[str],
    tokenizer: Tokenizer,
    *,
    before: Sequence[np.ndarray] = (),
) -> None:
    """Write a shard of shuffled texts, behind documents that are tokens already."""
    order = permute(np.arange(len(texts)), size=len(texts), keys=derive_keys("documents", name))
    shuffled = [texts[i] for i in order]
    text_bytes = sum(len(text.encode()) for text in shuffled)
    text_bytes += sum(len(tokenizer.decode(ids).encode()) for ids in before)
    documents = [*before, *_encode(shuffled, tokenizer)]
    dtype = token_dtype(tokenizer.vocabulary_size)
    write_shard(folder, name, documents, dtype=dtype, text_bytes=text_bytes)


def _encode(texts: list[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= ENCODE_BATCH_BYTES:
            yield from tokenizer.encode_documents(batch)
            batch, size = [], 0
    yield from tokenizer.encode_documents(batch)


def _write_manifest(job: Job, folder: Path, tokenizer: Tokenizer, num_units: int) -> None:
    kind, _ = parse_validation(job.validation)
    numbers = range(num_units)
    names = {
        "train": [f"train-{i:05d}" for i in numbers],
        "validation": {
            "hash": [f"validation-{i:05d}" for i in numbers],
            "first": ["validation-first"],
            "none": [],
        }[kind],
    }
    splits = {split: _summary(folder, shards) for split, shards in names.items()}
    if not splits["train"]["documents"]:
        raise ValueError(
            f"data.source={', '.join(job.sources)} leaves no document with text to train on "
            f"(validation={job.validation} took {splits['validation']['documents']})"
        )
    hashes = [[s["sha256"], s["ends_sha256"]] for split in splits.values() for s in split["shards"]]
    identity = {"tokenizer": tokenizer.sha256, "validation": job.validation, "shards": hashes}
    write_json(
        folder / MANIFEST,
        {
            "format_version": FORMAT_VERSION,
            "sources": list(job.sources),
            "validation": job.validation,
            "dtype": token_dtype(tokenizer.vocabulary_size).str,
            "tokenizer_sha256": tokenizer.sha256,
            "tokenizer_files": {
                path.name: hashlib.sha256(path.read_bytes()).hexdigest()
                for path in sorted((folder / TOKENIZER_FOLDER).iterdir())
            },
            "vocabulary_size": tokenizer.vocabulary_size,
            "end_of_text_id": tokenizer.end_of_text_id,
            "splits": splits,
            "fingerprint": hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        },
    )


def _summary(folder: Path, names: list[str]) -> dict:
    """Return the totals of a split and what the manifest keeps of each shard."""
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
