"""The job, which determines every byte of a prepared folder: sources, tokenizer, split."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain_lib.data.prepare.holdout import parse_validation
from pretrain_lib.data.text.encoder import PIECE_CHARACTERS, Encoder, choose_encoder, cut_text
from pretrain_lib.data.text.formats import Document
from pretrain_lib.data.text.sources import Source, open_source
from pretrain_lib.data.text.tokenizer import (
    Tokenizer,
    check_vocabulary_size,
    load_tokenizer,
    train_tokenizer,
)
from pretrain_lib.data.tokens.shards import FORMAT_VERSION, write_atomically

JOB = "job.json"
TOKENIZER_FOLDER = "tokenizer"
SAMPLE_CHARACTERS = 2**16  # size of the sample of each source on which encoders are compared
TRAINING_TEXT_BYTES = 200 * 2**20  # limit on the text that a tokenizer is trained on


@dataclass(frozen=True)
class Job:
    """The settings that determine every byte of a prepared folder.

    Raises ValueError unless exactly one of `tokenizer` and `train_tokenizer` is given, and for an
    invalid vocabulary size or validation rule.
    """

    sources: tuple[str | Source, ...]
    tokenizer: str | None = None  # folder, tokenizer.json or Hub id
    train_tokenizer: int | None = None  # vocabulary size of a tokenizer to train instead
    validation: str = "hash"  # hash, hash:SHARE, first:TOKENS, or none
    text_field: str = "text"
    max_rejected: int = 100  # limit on unreadable documents, which are left out

    def __post_init__(self) -> None:
        if (self.tokenizer is None) == (self.train_tokenizer is None):
            raise ValueError(
                "give exactly one of tokenizer=NAME (an existing tokenizer) and "
                "train_tokenizer=SIZE (train one on the text, with so many ids)"
            )
        if self.train_tokenizer is not None:
            check_vocabulary_size(self.train_tokenizer)
        parse_validation(self.validation)

    def open_sources(self) -> list[Source]:
        """Open the sources; raises ValueError for one that cannot be read."""
        return [
            open_source(source, text_field=self.text_field) if isinstance(source, str) else source
            for source in self.sources
        ]

    def source_names(self) -> list[str]:
        """Return the names of the sources."""
        return [s if isinstance(s, str) else s.name for s in self.sources]

    def record(self, *, content: bool = True) -> dict:
        """Return the record of the job that is stored with the data and compared on a later run.

        `content` says whether local files are identified by their content, or only by their sizes.
        """
        tokenizer = f"trained, {self.train_tokenizer} ids"
        if self.tokenizer is not None:
            tokenizer = load_tokenizer(self.tokenizer).sha256
        return {
            "format_version": FORMAT_VERSION,
            "sources": [source.identity(content=content) for source in self.open_sources()],
            "tokenizer": tokenizer,
            "validation": self.validation,
            "text_field": self.text_field,
        }


def check_same_job(folder: Path, record: dict) -> None:
    """Raise ValueError naming the differences if `folder` was prepared by another job."""
    if not (folder / JOB).is_file() or not has_shards(folder):
        return
    before = json.loads((folder / JOB).read_text())
    differences = [
        f"{key}: {before.get(key)} there, {record.get(key)} requested"
        for key in {**record, **before}
        if before.get(key) != record.get(key)
    ]
    if differences:
        raise ValueError(
            f"data.path={folder} was prepared differently ({'; '.join(differences)}); give "
            f"another folder, or delete this one"
        )


def has_shards(folder: Path) -> bool:
    return any(folder.glob("*.bin"))


def open_units(sources: list[Source], *, cut_text: bool = True) -> list[tuple[Source, Any]]:
    """Return the units of all sources, each with its source."""
    return [(s, unit) for s in sources for unit in s.units(cut_text=cut_text)]


def find_encoder(sources: list[Source], tokenizer: Tokenizer) -> Encoder:
    """Choose the fastest exact encoder for a tokenizer, tested on a sample of each source."""
    sample: list[str] = []
    for source in sources:
        documents, missing = _texts([source]), SAMPLE_CHARACTERS
        while missing > 0 and (text := next(documents, None)) is not None:
            sample.append(text[:missing])
            missing -= len(text)
    return choose_encoder(tokenizer, sample)


def write_tokenizer(job: Job, sources: list[Source], folder: Path) -> Tokenizer:
    """Return the tokenizer in `folder`, after copying or training it there if there is none."""
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
        write_atomically(path, path.read_bytes())  # fsync before the rename that commits the folder
    staging.rename(target)
    return tokenizer


def _training_texts(sources: list[Source]) -> Iterator[str]:
    size = 0
    for text in _texts(sources):
        yield from cut_text(text, PIECE_CHARACTERS)  # the trainer splits words there anyway
        size += len(text)
        if size > TRAINING_TEXT_BYTES:
            return


def _texts(sources: list[Source]) -> Iterator[str]:
    for source, unit in open_units(sources):
        for document in source.documents(unit):
            if isinstance(document, Document):
                yield document.text
