"""The data of a run: a prepared folder, an array that others wrote, or a source prepared now.

Floor 3.
"""

import fcntl
import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain_lib.config import DataConfig, Recipe
from pretrain_lib.data.foreign import open_foreign
from pretrain_lib.data.holdout import parse_validation
from pretrain_lib.data.prepare import (
    TOKENIZER_FOLDER,
    Job,
    check_same_job,
    default_folder,
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

FOREIGN_SUFFIXES = (".npy", ".bin")
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
    validation_bytes_per_token: float | None = None


def open_corpus(config: Recipe) -> Corpus:
    """Open what `config.data` names, preparing its source first if that was not done before.

    To be called before the processes of a run meet: rank 0 prepares, the others wait for it.
    """
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
    rule = "none" if _is_array(data.validation) else data.validation
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
    try:
        return default_folder(job)
    except ValueError:
        # Without a network the tokenizer fails first; what the user has to change is the source.
        for source in job.open_sources():
            source.estimated_bytes()
        raise


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
    train, held_out = manifest["splits"]["train"], manifest["splits"]["validation"]
    _check_ids(train["highest_id"], manifest["vocabulary_size"], vocabulary_size, folder)
    validation = _open_validation(folder, data, manifest, vocabulary_size)
    bytes_per_token = None
    if validation is not None and not _is_array(data.validation):
        bytes_per_token = held_out["text_bytes"] / held_out["tokens"]
    return Corpus(
        name=f"{', '.join(manifest['sources'])} in {folder}",
        train=open_split(folder, "train"),
        validation=validation,
        tokenizer=tokenizer,
        fingerprint=manifest["fingerprint"],
        id_range=(train["lowest_id"], train["highest_id"]),
        dtype=np.dtype(manifest["dtype"]).name,
        validation_bytes_per_token=bytes_per_token,
    )


def _open_validation(
    folder: Path, data: DataConfig, manifest: dict, vocabulary_size: int
) -> TokenArray | None:
    if _is_array(data.validation):
        return open_foreign(Path(data.validation).expanduser(), vocabulary_size=vocabulary_size)
    wanted, there = parse_validation(data.validation), manifest["validation"]
    if wanted[0] == "none":
        return None
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
    return open_split(folder, "validation")


def _is_array(validation: str) -> bool:
    return validation.endswith(FOREIGN_SUFFIXES)


def _open_array(path: Path, data: DataConfig, vocabulary_size: int) -> Corpus:
    for name, file in (("path", path), ("validation", Path(data.validation).expanduser())):
        if _is_array(str(file)) and not file.is_file():
            raise ValueError(f"data.{name}={file}: there is no such file")
    if not _is_array(data.validation) and data.validation != "none":
        raise ValueError(
            f"data.path={path} is an array without documents: give data.validation=PATH of another "
            f"array (.npy, .bin), or data.validation=none, not {data.validation}"
        )
    train = open_foreign(path, vocabulary_size=vocabulary_size)
    lowest, highest = _id_range(train)
    _check_ids(lowest if lowest < 0 else highest, None, vocabulary_size, path)
    validation = None
    if _is_array(data.validation):
        validation = open_foreign(
            Path(data.validation).expanduser(), vocabulary_size=vocabulary_size
        )
        low, high = _id_range(validation)
        _check_ids(low if low < 0 else high, None, vocabulary_size, data.validation)
    return Corpus(
        name=str(path),
        train=train,
        validation=validation,
        tokenizer=load_tokenizer(data.tokenizer) if data.tokenizer else None,
        fingerprint=_fingerprint(path),
        id_range=(lowest, highest),
        dtype=train.files[0].dtype.name,
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
