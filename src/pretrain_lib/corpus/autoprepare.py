"""Prepare the text of a recipe when the run starts: on rank 0, while the other ranks wait."""

import dataclasses
import hashlib
import json
import shlex
import sys
import time
from pathlib import Path

from pretrain_lib.config.derived_defaults import listed
from pretrain_lib.config.settings import DataConfig
from pretrain_lib.data.block_cache import cache_folder
from pretrain_lib.data.pool import count_cores
from pretrain_lib.data.prepare.job import Job, check_same_job, find_hints
from pretrain_lib.data.prepare.prepare import prepare
from pretrain_lib.data.prepare.spool import Spool, open_spool
from pretrain_lib.data.tokens.foreign import names_tokens
from pretrain_lib.data.tokens.shards import MANIFEST
from pretrain_lib.files.locks import is_locked
from pretrain_lib.ranks import is_local_main_rank, is_main_rank

PREPARE_LIMIT_TOKENS = 1_000_000_000  # larger sources need `pretrain prepare`
BYTES_PER_TOKEN = 4  # a low estimate for English under a byte-level BPE
POLL_SECONDS, PATIENCE_SECONDS = 0.5, 180


def prepare_source(data: DataConfig, path: Path | None) -> Path:
    """Prepare `data.source` into `path`, or a cache folder, unless it is prepared already.

    Returns the folder. Raises ValueError for a source too large for a recipe to prepare; the
    message has the command that prepares it.
    """
    job = _job(data)
    folder = path or _job_folder(job)
    if (folder / MANIFEST).is_file():
        check_same_job(folder, job.record())
        return folder
    if is_main_rank():
        _refuse_large_source(job, folder, data.workers)
        for hint in find_hints(job, job.open_sources()):
            print(hint, file=sys.stderr)
        prepare(job, folder, workers=data.workers)
    else:
        await_file(folder / MANIFEST, folder)
    return folder


def open_stream(data: DataConfig, folder: Path, sequence_length: int) -> Spool:
    """Open the spool of `data.source` in `folder`; one process per machine prepares it."""
    segment_tokens = data.spool_tokens // sequence_length * sequence_length
    if not is_local_main_rank():
        await_file(folder / MANIFEST, folder)
    return open_spool(_job(data), folder, segment_tokens=segment_tokens)


def _job(data: DataConfig) -> Job:
    sources = tuple(listed(data.source))
    rule = "none" if names_tokens(data.validation) else data.validation
    train_tokenizer = None if data.tokenizer else data.train_tokenizer
    job = Job(
        sources,
        data.tokenizer,
        train_tokenizer,
        rule,
        data.text_field,
        data.max_rejected,
        data.document_separator,
    )
    job.open_sources()  # reports a missing or empty source before anything is written
    return job


def _job_folder(job: Job) -> Path:
    """Return the cache folder of a job, named by a hash of its record."""
    try:
        record = job.record()
    except ValueError:
        # Without a network, loading the tokenizer fails first. If the source is on the Hub too,
        # raise its error instead: the source is what the user has to change.
        for source in job.open_sources():
            source.estimated_bytes()
        raise
    key = hashlib.sha256(json.dumps(record).encode()).hexdigest()[:12]
    name = Path(job.source_names()[0]).name.replace(":", "-")
    return cache_folder() / f"{name}-{key}"


def _refuse_large_source(job: Job, folder: Path, workers: int | None) -> None:
    sizes = [source.estimated_bytes() for source in job.open_sources()]
    tokens = None if None in sizes else sum(sizes) // BYTES_PER_TOKEN
    if tokens is not None and tokens <= PREPARE_LIMIT_TOKENS:
        return
    size = "of unknown size" if tokens is None else f"about {tokens / 1e9:.1f}B tokens"
    raise ValueError(
        f"data.source={' '.join(job.source_names())} is {size}, more than the "
        f"{PREPARE_LIMIT_TOKENS:.0e} tokens that a recipe prepares by itself. Prepare it once "
        f"with\n"
        f"  {_prepare_command(job, folder, workers or count_cores())}\n"
        f"and start the recipe again with --data.path {shlex.quote(str(folder))}, or tokenize it "
        f"during training (--data.streaming true)"
    )


def _prepare_command(job: Job, folder: Path, workers: int) -> str:
    """Return the command that prepares a job into a folder."""
    values = {
        field.name: getattr(job, field.name)
        for field in dataclasses.fields(job)
        if field.name not in ("sources", "validation")
        and getattr(job, field.name) not in (None, field.default)
    }
    values |= {"validation": job.validation, "out": folder, "workers": workers}
    flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return shlex.join(["pretrain", "prepare", *job.source_names(), *flags])


def await_file(path: Path, folder: Path) -> None:
    """Wait until another process has written the file `path`.

    Raises ValueError once no process has held the lock of `folder` for `PATIENCE_SECONDS`.
    """
    idle_since = time.monotonic()
    while not path.is_file():
        if is_locked(folder):
            idle_since = time.monotonic()
        if time.monotonic() - idle_since > PATIENCE_SECONDS:
            raise ValueError(
                f"data.path={folder}: rank 0 has prepared nothing here; see its message, and if it "
                f"has none, give --data.path on a disk that all machines share"
            )
        time.sleep(POLL_SECONDS)
