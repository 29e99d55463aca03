"""The data of a run: a prepared folder, an array that others wrote, or a source prepared now.

Floor 3.
"""

import fcntl
import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain_lib.config import DataConfig, Recipe
from pretrain_lib.data.batches import PackedDataset
from pretrain_lib.data.foreign import FOREIGN_SUFFIXES, open_foreign
from pretrain_lib.data.holdout import parse_validation
from pretrain_lib.data.packing import validation_windows
from pretrain_lib.data.prepare import (
    TOKENIZER_FOLDER,
    Job,
    check_same_job,
    prepare,
)
from pretrain_lib.data.shards import (
    LOCK,
    MANIFEST,
    TokenArray,
    open_split,
    read_manifest,
)
from pretrain_lib.data.tokenizer import Tokenizer, load_tokenizer

PREPARE_LIMIT_TOKENS = 1_000_000_000  # more is prepared by a command of its own, not by a recipe
BYTES_PER_TOKEN = 4  # a low estimate for English under a byte-level BPE
SCANNED_TOKENS = 2**30  # at most so many ids of a foreign array are looked at before the start
POLL_SECONDS, PATIENCE_SECONDS = 0.5, 60


@dataclass(frozen=True)
class Corpus:
    """What a run reads: tokens to train on and to validate on, and what they mean."""

    name: str
    train: TokenArray
    validation: TokenArray | None
    tokenizer: Tokenizer | None
    fingerprint: str
    id_range: tuple[int, int]
    dtype: str
    validation_name: str = "none"


def open_corpus(config: Recipe) -> Corpus:
    """Open what `config.data` names, preparing its source first if that was not done before.

    To be called before the processes of a run meet: rank 0 prepares, the others wait for it.
    """
    corpus = _open(config)
    length = config.batch.sequence_length
    masking = config.data.document_masking
    PackedDataset(corpus.train, sequence_length=length, document_masking=masking)
    if corpus.validation is not None:
        validation_windows(corpus.validation, length, max_tokens=config.run.evaluate_tokens)
    return corpus


def _open(config: Recipe) -> Corpus:
    data, vocabulary_size = config.data, config.model.vocabulary_size
    path = Path(data.path).expanduser() if data.path else None
    if path is not None and path.suffix in FOREIGN_SUFFIXES:
        return _open_array(path, data, vocabulary_size)
    if data.source is None:
        if path is None:
            raise ValueError("data.source or data.path must be given: there is nothing to read")
        folder = path
    else:
        folder = _prepare_source(data, path)
    return _open_prepared(folder, data, vocabulary_size)


def _prepare_source(data: DataConfig, path: Path | None) -> Path:
    sources = (data.source,) if isinstance(data.source, str) else tuple(data.source)
    rule = "none" if _is_path(data.validation) else data.validation
    train_tokenizer = None if data.tokenizer else data.train_tokenizer
    job = Job(sources, data.tokenizer, train_tokenizer, rule, data.text_field)
    job.open_sources()  # what is missing or empty is said before anything is made
    folder = path or _cache_folder(job)
    if (folder / MANIFEST).is_file():
        check_same_job(folder, job.record())
        return folder
    if int(os.environ.get("RANK", 0)) == 0:
        _refuse_large_source(job, folder, data.workers)
        prepare(job, folder, workers=data.workers)
    else:
        _await_manifest(folder)
    return folder


def _cache_folder(job: Job) -> Path:
    """Return the cache folder of a job, named by what decides its bytes."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    try:
        record = job.record()
    except ValueError:
        # Without a network the tokenizer fails first; what the user has to change is the source.
        for source in job.open_sources():
            source.estimated_bytes()
        raise
    key = hashlib.sha256(json.dumps(record).encode()).hexdigest()[:12]
    return cache / "pretrain_lib" / f"{Path(job.sources[0]).name.replace(':', '-')}-{key}"


def _refuse_large_source(job: Job, folder: Path, workers: int) -> None:
    sizes = [source.estimated_bytes() for source in job.open_sources()]
    tokens = None if None in sizes else sum(sizes) // BYTES_PER_TOKEN
    if tokens is not None and tokens <= PREPARE_LIMIT_TOKENS:
        return
    size = "of unknown size" if tokens is None else f"about {tokens / 1e9:.1f}B tokens"
    tokenizer = f"--tokenizer {job.tokenizer}"
    if job.tokenizer is None:
        tokenizer = f"--train_tokenizer {job.train_tokenizer}"
    raise ValueError(
        f"data.source={', '.join(job.sources)} is {size}, more than the "
        f"{PREPARE_LIMIT_TOKENS:.0e} that a recipe prepares by itself. Prepare it once with\n"
        f"  pretrain prepare {' '.join(job.sources)} {tokenizer} --validation {job.validation} "
        f"--out {folder} --workers {max(workers, os.cpu_count() or 1)}\n"
        f"and start the recipe again with --data.path {folder}"
    )


def _await_manifest(folder: Path) -> None:
    """Wait until rank 0 has written the folder, as long as somebody works on it."""
    idle_since = time.monotonic()
    while not (folder / MANIFEST).is_file():
        if _is_locked(folder / LOCK):
            idle_since = time.monotonic()
        if time.monotonic() - idle_since > PATIENCE_SECONDS:
            raise ValueError(f"data.path={folder}: rank 0 did not prepare it; see its message")
        time.sleep(POLL_SECONDS)


def _is_locked(path: Path) -> bool:
    if not path.exists():
        return False
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _open_prepared(folder: Path, data: DataConfig, vocabulary_size: int) -> Corpus:
    manifest = read_manifest(folder)
    tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER)
    if data.tokenizer and load_tokenizer(data.tokenizer).sha256 != manifest["tokenizer_sha256"]:
        raise ValueError(
            f"data.tokenizer={data.tokenizer} is not the tokenizer that data.path={folder} was "
            f"prepared with ({folder / TOKENIZER_FOLDER}); leave data.tokenizer out, or prepare "
            f"the text again"
        )
    train = manifest["splits"]["train"]
    _check_ids(train["highest_id"], manifest["vocabulary_size"], vocabulary_size, folder)
    validation, validation_name = _open_validation(folder, data, manifest, vocabulary_size)
    return Corpus(
        name=f"{', '.join(manifest['sources'])} in {folder}",
        train=open_split(folder, "train"),
        validation=validation,
        tokenizer=tokenizer,
        fingerprint=manifest["fingerprint"],
        id_range=(train["lowest_id"], train["highest_id"]),
        dtype=np.dtype(manifest["dtype"]).name,
        validation_name=validation_name,
    )


def _open_validation(
    folder: Path, data: DataConfig, manifest: dict, vocabulary_size: int
) -> tuple[TokenArray | None, str]:
    """Return the held-out tokens and the rule or path that they come from."""
    if _is_path(data.validation):
        path = Path(data.validation).expanduser()
        return _open_validation_path(path, manifest["tokenizer_sha256"], vocabulary_size)
    wanted, there = parse_validation(data.validation), manifest["validation"]
    if wanted[0] == "none":
        return None, "none"
    if wanted != parse_validation(there) and data.source is not None:
        raise ValueError(
            f"data.validation={data.validation}, but data.path={folder} was prepared with {there}"
        )
    if not manifest["splits"]["validation"]["tokens"]:
        raise ValueError(
            f"data.path={folder} holds no validation text: data.validation={there} held out none "
            f"of {manifest['splits']['train']['documents']:,} documents; hold out more "
            f"(hash:SHARE), or first:TOKENS of the source, or give data.validation=none"
        )
    return open_split(folder, "validation"), there


def _open_validation_path(
    path: Path, tokenizer_sha256: str | None, vocabulary_size: int
) -> tuple[TokenArray, str]:
    """Open an array, or a prepared folder: what it holds out, or all of it if that is nothing."""
    if path.suffix in FOREIGN_SUFFIXES:
        tokens = open_foreign(path, vocabulary_size=vocabulary_size)
        lowest, highest = _id_range(tokens)
        _check_ids(lowest if lowest < 0 else highest, None, vocabulary_size, path)
        return tokens, str(path)
    manifest = read_manifest(path)
    if tokenizer_sha256 not in (None, manifest["tokenizer_sha256"]):
        raise ValueError(
            f"data.validation={path} was prepared with another tokenizer than data.path; prepare "
            f"it with the tokenizer folder of that"
        )
    _check_ids(manifest["vocabulary_size"] - 1, None, vocabulary_size, path)
    split = "validation" if manifest["splits"]["validation"]["tokens"] else "train"
    return open_split(path, split), f"{split} of {path}"


def _is_path(validation: str) -> bool:
    return validation.endswith(FOREIGN_SUFFIXES) or Path(validation).expanduser().is_dir()


def _open_array(path: Path, data: DataConfig, vocabulary_size: int) -> Corpus:
    train = open_foreign(path, vocabulary_size=vocabulary_size)
    if not _is_path(data.validation) and data.validation != "none":
        raise ValueError(
            f"data.path={path} is an array without documents: give data.validation=PATH of another "
            f"array (.npy, .bin) or prepared folder, or data.validation=none, not {data.validation}"
        )
    lowest, highest = _id_range(train)
    _check_ids(lowest if lowest < 0 else highest, None, vocabulary_size, path)
    tokenizer = load_tokenizer(data.tokenizer) if data.tokenizer else None
    validation, validation_name = None, "none"
    if data.validation != "none":
        held_out, sha256 = Path(data.validation).expanduser(), tokenizer and tokenizer.sha256
        validation, validation_name = _open_validation_path(held_out, sha256, vocabulary_size)
    return Corpus(
        name=str(path),
        train=train,
        validation=validation,
        tokenizer=tokenizer,
        fingerprint=_fingerprint(path),
        id_range=(lowest, highest),
        dtype=train.files[0].dtype.name,
        validation_name=validation_name,
    )


def _check_ids(
    worst: int, tokenizer_size: int | None, vocabulary_size: int, path: Path | str
) -> None:
    needed = max(worst + 1, tokenizer_size or 0)
    if worst < 0 or needed > vocabulary_size:
        raise ValueError(
            f"model.vocabulary_size={vocabulary_size} is too small for {path}: its ids go "
            f"{'down' if worst < 0 else 'up'} to {worst}"
            + (f", its tokenizer has {tokenizer_size}" if tokenizer_size else "")
            + f"; set model.vocabulary_size={needed} or more"
        )


def _id_range(tokens: TokenArray) -> tuple[int, int]:
    """Return the lowest and highest id among the first `SCANNED_TOKENS`; reads check the rest."""
    file, step = tokens.files[0], 2**24
    lowest, highest = 2**63 - 1, -1
    for start in range(0, min(len(tokens), SCANNED_TOKENS), step):
        ids = file.read(start, min(step, len(tokens) - start))
        lowest, highest = min(lowest, int(ids.min())), max(highest, int(ids.max()))
    return lowest, highest


def _fingerprint(path: Path) -> str:
    """Return a hash of a file's size and of 64 stretches spread over it."""
    size, stretch = path.stat().st_size, 2**16
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(64):
            file.seek(i * max(0, size - stretch) // 63)
            digest.update(file.read(stretch))
    return digest.hexdigest()
