"""The job, which determines every byte of a prepared folder: sources, tokenizer, split."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain_lib.data.prepare.holdout import parse_validation
from pretrain_lib.data.remote import RemoteFile
from pretrain_lib.data.text.encoder import PIECE_CHARACTERS, Encoder, choose_encoder, cut_text
from pretrain_lib.data.text.formats import Document, has_lines, is_one_document, is_readable
from pretrain_lib.data.text.opening import open_source
from pretrain_lib.data.text.separators import (
    check_separator,
    hint_at_missed_separator,
    hint_at_separator,
)
from pretrain_lib.data.text.sources import FileSource, Source
from pretrain_lib.data.text.tokenizer import (
    Tokenizer,
    check_vocabulary_size,
    load_tokenizer,
    train_tokenizer,
)
from pretrain_lib.data.tokens.manifests import FORMAT_VERSION, JOB, REMEDY, TOKENIZER_FOLDER
from pretrain_lib.data.tokens.places import Place, on_disk
from pretrain_lib.data.tokens.verify import check_tokenizer
from pretrain_lib.files.reading import interpreting, read_object
from pretrain_lib.files.writes import staged, write_atomically
from pretrain_lib.values import check_value, show
from pretrain_lib.wording import plural, show_path

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
    document_separator: str | None = None  # a line between the documents of a .txt file
    loss_spans: str | None = None  # a JSON field with the spans of the text that are trained on

    def __post_init__(self) -> None:
        if isinstance(self.sources, str | Path) or not self.sources:
            raise ValueError(
                f"sources={show(self.sources)} must be one or several sources in a tuple or list, "
                f"such as ('my_texts/',)"
            )
        named = (str(s) if isinstance(s, Path) else s for s in self.sources)
        object.__setattr__(self, "sources", tuple(named))
        if isinstance(self.tokenizer, Path):
            object.__setattr__(self, "tokenizer", str(self.tokenizer))
        numbers = {
            "max_rejected": check_value(self.max_rejected, "data.max_rejected", int, minimum=0),
            "train_tokenizer": check_value(
                self.train_tokenizer, "data.train_tokenizer", int | None
            ),
        }
        for name, number in numbers.items():
            object.__setattr__(self, name, number)
        if (self.tokenizer is None) == (self.train_tokenizer is None):
            raise ValueError(
                "give exactly one of data.tokenizer=NAME (an existing tokenizer) and "
                "data.train_tokenizer=SIZE (train one on the text, with so many ids)"
            )
        if self.train_tokenizer is not None:
            check_vocabulary_size(self.train_tokenizer)
        parse_validation(self.validation)
        if self.document_separator is not None:
            check_separator(self.document_separator)
        if self.loss_spans is not None and parse_validation(self.validation)[0] == "first":
            raise ValueError(
                f"data.loss_spans={self.loss_spans!r} needs whole documents, but data.validation="
                f"{self.validation} may cut one; hold out hash:SHARE or none"
            )

    def open_sources(self) -> list[Source]:
        """Open the sources; raises ValueError for one that cannot be read."""
        opened = [
            open_source(
                source,
                text_field=self.text_field,
                document_separator=self.document_separator,
                loss_spans=self.loss_spans,
            )
            if isinstance(source, str)
            else source
            for source in self.sources
        ]
        files = [file for s in opened if isinstance(s, FileSource) for file in s.files]
        if self.document_separator is not None and not any(map(is_one_document, files)):
            raise ValueError(
                f"data.document_separator={self.document_separator!r} splits .txt files, of which "
                f"data.source={', '.join(self.source_names())} has none; leave the separator out"
            )
        is_spanned = [isinstance(s, FileSource) and all(map(has_lines, s.files)) for s in opened]
        if self.loss_spans is not None and not all(is_spanned):
            raise ValueError(
                f"data.loss_spans={self.loss_spans!r} is a field of JSON lines, but data.source="
                f"{', '.join(self.source_names())} has other files; give .jsonl or .ndjson files"
            )
        return opened

    def source_names(self) -> list[str]:
        """Return the names of the sources."""
        return [s if isinstance(s, str) else s.name for s in self.sources]

    def record(self, sources: Sequence[Source] = (), *, content: bool = True) -> dict:
        """Return the record of the job that is stored with the data and compared on a later run.

        `sources` are its own, if they are open. `content` says whether local files are identified
        by their content, or only by their sizes.
        """
        tokenizer = f"trained, {self.train_tokenizer} ids"
        if self.tokenizer is not None:
            tokenizer = load_tokenizer(self.tokenizer).sha256
        settings = {
            "document_separator": self.document_separator,
            "loss_spans": self.loss_spans,
        }
        return {
            "format_version": FORMAT_VERSION,
            "sources": [s.identity(content=content) for s in sources or self.open_sources()],
            "tokenizer": tokenizer,
            "validation": self.validation,
            "text_field": self.text_field,
            **{name: value for name, value in settings.items() if value is not None},
        }


def check_same_job(folder: Path, record: dict) -> None:
    """Raise ValueError naming the differences if `folder` was prepared by another job."""
    if not (folder / JOB).is_file() or not has_shards(folder):
        return
    before = read_object(folder / JOB, remedy=REMEDY)
    with interpreting(folder / JOB, remedy=REMEDY):
        differences = [
            _difference(key, before.get(key), record.get(key))
            for key in {**record, **before}
            if before.get(key) != record.get(key)
        ]
    if differences:
        raise ValueError(
            f"data.path={folder} was prepared differently ({'; '.join(differences)}); give "
            f"another folder, or delete this one"
        )


def _difference(key: str, before: Any, now: Any) -> str:
    """Say how what a folder was prepared from differs from what is asked for now."""
    if key != "sources" or not isinstance(before, list):
        return f"{key}: {before} there, {now} requested"
    names = [[show_path(source["name"]) for source in sources] for sources in (before, now)]
    if names[0] != names[1]:
        return f"sources: {', '.join(names[0])} there, {', '.join(names[1])} requested"
    changed = [n for n, old, new in zip(names[0], before, now, strict=True) if old != new]
    return f"the text of {', '.join(changed)} has changed since"


def find_hints(job: Job, sources: Sequence[Source]) -> Iterator[str]:
    """Yield a hint for what is probably not meant: files read twice, or several documents as one.

    A file that is read twice may be in two sources, or have two names.
    """
    files = [file for s in sources if isinstance(s, FileSource) for file in s.files]
    names: dict[object, list[str]] = {}
    for file in files:
        names.setdefault(_file_identity(file), []).append(show_path(file))
    if repeated := [own for own in names.values() if len(own) > 1]:
        count = f"{plural(len(repeated), 'file')} {'is' if len(repeated) == 1 else 'are'}"
        places = " and ".join(dict.fromkeys(repeated[0][:2]))
        yield (
            f"hint: {count} read more than once (the first: {places}); to give a text more weight, "
            f"prepare it by itself and mix it with data.weights"
        )
    texts = [file for file in files if is_readable(file) and is_one_document(file)]
    hint = None
    if job.document_separator is not None:
        hint = hint_at_missed_separator(texts, job.document_separator)
    elif texts:
        own = [] if job.tokenizer is None else [load_tokenizer(job.tokenizer).end_of_text]
        hint = hint_at_separator(texts, *own)
    if hint is not None:
        yield hint


def _file_identity(file: Path | RemoteFile) -> object:
    if isinstance(file, RemoteFile):
        return str(file)
    status = file.stat()
    return status.st_dev, status.st_ino


def has_shards(folder: Path) -> bool:
    return any(folder.glob("*.bin"))


def drop_shards(folder: Path) -> None:
    """Delete all shards of a folder, each whole or not at all if this is interrupted."""
    for path in folder.glob("*.bin"):
        for suffix in (".json", ".ends.npy", ".loss", ".bin"):  # first what commits a shard
            path.with_name(path.name.removesuffix(".bin") + suffix).unlink(missing_ok=True)


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
    staging = staged(target)
    shutil.rmtree(staging, ignore_errors=True)
    tokenizer.save(staging)
    for path in list(staging.iterdir()):
        write_atomically(path, path.read_bytes())  # fsync before the rename that commits the folder
    staging.rename(target)
    return tokenizer


def load_prepared_tokenizer(folder: Place, manifest: dict) -> Tokenizer:
    """Load the tokenizer of a prepared folder; raises ValueError if it is another one."""
    check_tokenizer(folder, manifest)
    with on_disk(folder / TOKENIZER_FOLDER, list(manifest["tokenizer_files"])) as local:
        return load_tokenizer(local)


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
