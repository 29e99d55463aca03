"""Text from rows of a dataset: one of `datasets`, or one of the Hugging Face hub."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pretrain_lib.data.text.formats import Document, Rejected, is_text

EMBEDDED_CORPUS = "python-stdlib"
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?:@([\w.-]+))?")
UNIT_ROWS, MAX_UNITS = 50_000, 4096


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
