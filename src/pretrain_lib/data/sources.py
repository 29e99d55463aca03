"""Where text comes from: the embedded corpus, local files, and datasets of the Hugging Face hub.

A source is cut into units of work before any work starts, so what is written later does not depend
on how many processes write it. Floor 1.
"""

import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import xxhash

from pretrain_lib.data.formats import (
    SUFFIXES,
    Document,
    FileSlice,
    Rejected,
    cut_file,
    is_one_document,
    is_readable,
    is_text,
    read_documents,
)

EMBEDDED_CORPUS = "python-stdlib"
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?:@([\w.-]+))?")
UNIT_BYTES = (4 * 2**20, 64 * 2**20)  # smallest and largest unit of local text
UNIT_ROWS, MAX_UNITS = 50_000, 4096  # of a dataset of `datasets`


@dataclass(frozen=True)
class FileSource:
    """Local files: a `.txt` is one document; every JSON line and every `.parquet` row is one."""

    name: str
    files: tuple[Path, ...]
    text_field: str

    def identity(self, *, content: bool = True) -> dict:
        """Return what this source's documents depend on: names, sizes and hashes of its files."""
        digest = xxhash.xxh3_128()
        for path in self.files:
            digest.update(f"{path.name}|{path.stat().st_size}|".encode())
            with path.open("rb") as file:
                while content and (chunk := file.read(2**20)):
                    digest.update(chunk)
        name = Path(self.name).name  # the same text under another path is the same source
        return {"name": name, "files": len(self.files), "xxh3_128": digest.hexdigest()}

    def estimated_bytes(self) -> int:
        """Return the size of the text in bytes, for compressed files a guess."""
        whole = {"text_field": self.text_field, "cut_text": False}
        pieces = (piece for path in self.files for piece in cut_file(path, 2**62, **whole))
        return sum(piece.text_bytes for piece in pieces)

    def units(self, *, cut_text: bool = True) -> list[tuple[FileSlice, ...]]:
        """Cut the files into units of near-equal size, in an order that depends on them alone.

        `cut_text` is whether large `.txt` files, one document each, may be cut too.
        """
        smallest, largest = UNIT_BYTES
        size = min(max(self.estimated_bytes() // 256, smallest), largest)
        units: list[list[FileSlice]] = []
        filled = size
        for path in self.files:
            pieces = cut_file(path, size, text_field=self.text_field, cut_text=cut_text)
            alone = is_one_document(path) and len(pieces) > 1
            for piece in pieces:
                if filled >= size or alone:
                    units.append([])
                    filled = 0
                units[-1].append(piece)
                filled = size if alone else filled + piece.text_bytes
        return [tuple(unit) for unit in units]

    def unit_bytes(self, unit: tuple[FileSlice, ...]) -> int:
        """Return about how much text a unit holds, in bytes."""
        return sum(piece.text_bytes for piece in unit)

    def documents(self, unit: tuple[FileSlice, ...]) -> Iterator[Document | Rejected]:
        """Yield each document of a unit, empty ones included, and those that cannot be read."""
        for piece in unit:
            yield from read_documents(piece, self.text_field)


@dataclass(frozen=True)
class DatasetSource:
    """A `datasets.Dataset` or `IterableDataset`: one document a row, in order.

    Its shards are its units. What `take` or `skip` gives is one unit: shard by shard it would be
    other rows; `interleave_datasets` interleaves the shards. Raises ValueError for one with a
    shuffle buffer: after a restart it would give other rows, and windows are shuffled here anyway.
    """

    dataset: Any
    name: str
    text_field: str = "text"

    def __post_init__(self) -> None:
        if (columns := self.dataset.column_names) and self.text_field not in columns:
            raise ValueError(
                f"data.text_field={self.text_field!r} is no column of {self.name}; it has "
                f"{', '.join(columns)}"
            )
        if self._has_steps("BufferShuffled"):
            raise ValueError(
                f"data.source={self.name} was shuffled with a buffer of `datasets`, which gives "
                f"other rows after a restart; leave .shuffle(buffer_size=...) out: documents and "
                f"windows are shuffled by pretrain_lib"
            )

    def identity(self, *, content: bool = True) -> dict:  # noqa: ARG002 (the content is its name's)
        """Return what this source's documents depend on."""
        return {"name": self.name}

    def estimated_bytes(self) -> int | None:
        """Return the size of the text in bytes, if the dataset states it."""
        return self.dataset.info.dataset_size or self.dataset.info.download_size

    def units(self, *, cut_text: bool = True) -> list[tuple[int, int]]:  # noqa: ARG002 (no files)
        """Return `(shard, number of shards)` of each unit."""
        count = 1 if self._has_steps("Take", "Skip") else min(self._rows().num_shards, MAX_UNITS)
        return [(index, count) for index in range(count)]

    def unit_bytes(self, unit: tuple[int, int]) -> int:
        """Return about how much text a unit holds, in bytes; 0 if that is not known."""
        return (self.estimated_bytes() or 0) // unit[1]

    def documents(self, unit: tuple[int, int]) -> Iterator[Document | Rejected]:
        """Yield each document of a unit, empty ones included, and rows that hold no text."""
        index, count = unit
        rows = self._rows().shard(num_shards=count, index=index, contiguous=True)
        for number, row in enumerate(rows):
            text = row.get(self.text_field, False)
            text = "" if text is None else text  # a column may hold nulls
            where = f"{self.name}, row {number} of unit {index}"
            reason = f"no text in data.text_field={self.text_field!r}"
            yield Document(text) if is_text(text) else Rejected(where, reason)

    def _has_steps(self, *kinds: str) -> bool:
        """Return whether rows pass through a step of `datasets` of such a kind, however deep."""
        steps = [getattr(self.dataset, "_ex_iterable", None)]
        for step in steps:
            inner = getattr(step, "ex_iterable", None), *(getattr(step, "ex_iterables", None) or ())
            steps.extend(part for part in inner if part is not None)
        return any(type(step).__name__.startswith(kinds) for step in steps)

    def _rows(self) -> Any:
        rows = self.dataset
        if hasattr(rows, "to_iterable_dataset"):
            rows = rows.to_iterable_dataset(num_shards=max(1, len(rows) // UNIT_ROWS))
        rows = rows.select_columns([self.text_field]) if rows.column_names else rows
        return rows.with_format(None).reshard()


@dataclass(frozen=True)
class HubSource:
    """A dataset of the hub, `OWNER/NAME[:CONFIG][@REVISION]`: its `train` split, read as it comes.

    Nothing but tokens is written to disk. Give a revision where a restart may fall on another day.
    """

    name: str
    text_field: str

    def identity(self, *, content: bool = True) -> dict:  # noqa: ARG002 (the content is its name's)
        """Return what this source's documents depend on."""
        return {"name": self.name, "split": "train"}

    def estimated_bytes(self) -> int | None:
        """Return the size of the text in bytes as the hub states it; None if it does not."""
        return self._open().estimated_bytes()

    def units(self, *, cut_text: bool = True) -> list[tuple[int, int]]:
        """Return `(shard, number of shards)` of each unit."""
        return self._open().units(cut_text=cut_text)

    def unit_bytes(self, unit: tuple[int, int]) -> int:  # noqa: ARG002 (asking costs a request)
        """Return 0: how much text a unit holds is not known."""
        return 0

    def documents(self, unit: tuple[int, int]) -> Iterator[Document | Rejected]:
        """Yield each document of a unit, empty ones included, and rows that hold no text."""
        return self._open().documents(unit)

    def _open(self) -> DatasetSource:
        return _load_from_hub(self.name, self.text_field)


@lru_cache  # a request or several, once per process
def _load_from_hub(name: str, text_field: str) -> DatasetSource:
    from datasets import load_dataset

    path, config, revision = HUB_NAME.fullmatch(name).groups()
    try:
        rows = load_dataset(path, config, split="train", revision=revision, streaming=True)
    except Exception as error:  # datasets and the hub client raise many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"data.source={name} could not be loaded from the hub ({reason}). Without a network "
            f"use local files (--data.source corpus.jsonl), a folder made by `pretrain prepare` "
            f"elsewhere (--data.path FOLDER), or the embedded corpus "
            f"(--data.source {EMBEDDED_CORPUS})"
        ) from error
    return DatasetSource(rows, name, text_field)


Source = FileSource | DatasetSource | HubSource


def open_source(name: str, *, text_field: str = "text") -> Source:
    """Return the source called `name`: the embedded corpus, a file, a folder, or a hub dataset.

    Raises ValueError for a missing path, a kind of file that is not read, or a source without text.
    """
    path = Path(name).expanduser()
    known = ", ".join(SUFFIXES)
    if name == EMBEDDED_CORPUS:
        files = _standard_library_files()
    elif path.is_dir():
        files = tuple(sorted(p for p in path.rglob("*") if is_readable(p) and p.is_file()))
        if not files:
            raise ValueError(f"data.source={name}: the folder holds none of {known}")
    elif path.is_file():
        if not is_readable(path):
            raise ValueError(
                f"data.source={name}: the file must end in one of {known} (a .txt is one document, "
                f"a line or row of the others is one, in the field {text_field!r}); token arrays "
                f"(.npy, .bin, .ds) are given as --data.path"
            )
        files = (path,)
    elif path.exists():
        raise ValueError(
            f"data.source={name} is a pipe or device, which cannot be read again after a restart; "
            f"write it to a file first"
        )
    elif HUB_NAME.fullmatch(name) and not name.startswith("."):
        return HubSource(name, text_field)
    else:
        raise ValueError(
            f"data.source={name}: there is no such file or folder, and it is neither "
            f"{EMBEDDED_CORPUS} nor a hub dataset OWNER/NAME[:CONFIG][@REVISION]"
        )
    if not sum(file.stat().st_size for file in files):
        raise ValueError(f"data.source={name} is empty: it needs at least one document with text")
    return FileSource(name, files, text_field)


def _standard_library_files() -> tuple[Path, ...]:
    """Return the sources of the running interpreter's standard library, tests left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
    files = sorted(
        path
        for path in root.rglob("*.py")
        if not left_out & set(path.relative_to(root).parts[:-1]) and path.stat().st_size
    )
    return tuple(file for file in files if _is_utf8(file))


def _is_utf8(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True
