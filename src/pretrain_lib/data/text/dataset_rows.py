"""Text from the rows of a `datasets` dataset, as an object or a name on the Hugging Face Hub."""

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.reduction import ForkingPickler
from typing import Any

from pretrain_lib.data.text.documents import Document, Rejected, is_text
from pretrain_lib.wording import in_line, without_queries

EMBEDDED_CORPUS = "python-stdlib"
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?:@([\w.-]+))?")
UNIT_ROWS, MAX_UNITS = 50_000, 4096
# Steps of an IterableDataset that act on each row alone, so that its shards, one after the other,
# give the rows of the whole; of the others this is not known.
BY_ROW = {
    "ExamplesIterable",
    "ArrowExamplesIterable",
    "RebatchedArrowExamplesIterable",
    "FormattedExamplesIterable",
    "SelectColumnsIterable",
    "MappedExamplesIterable",
    "FilteredExamplesIterable",
    "VerticallyConcatenatedMultiSourcesExamplesIterable",
}
NOT_BY_ROW = ("with_indices", "batched", "drop_last_batch")  # options of such steps


@dataclass(frozen=True)
class DatasetSource:
    """A `datasets.Dataset` or `IterableDataset`: one document per row, in order.

    Each shard of the dataset is a unit of work if all its steps act on each row alone: `map` and
    `filter` without indices and batches, columns, `concatenate_datasets`, and what `with_transform`
    of a `Dataset` does. Any other dataset is a single unit, since sharding it could select other
    rows. Raises ValueError for a dataset with a shuffle buffer: after a restart it would give other
    rows, and documents and windows are shuffled by this library anyway.

    The source is identified by its name only, since `datasets` has no fingerprint that is the same
    after a restart. If the rows change, change the name or the folder too: otherwise the data that
    was prepared from the old rows is used for the new ones.
    """

    dataset: Any
    name: str
    text_field: str = "text"

    def __post_init__(self) -> None:
        if isinstance(self.dataset, dict):
            raise ValueError(
                f"data.source={self.name} holds splits ({type(self.dataset).__name__}), not rows; "
                f"give one of them: {', '.join(map(str, self.dataset))}"
            )
        if (columns := self._columns()) and self.text_field not in columns:
            is_hidden = self.text_field in self.dataset.column_names
            raise ValueError(
                f"data.text_field={self.text_field!r} is not a column of {self.name}; its columns "
                f"are {', '.join(map(str, columns))}"
                + is_hidden
                * "; its format hides that column, which .with_format(None) shows"
            )
        if any(type(step).__name__.startswith("BufferShuffled") for step in self._steps()):
            raise ValueError(
                f"data.source={self.name} was shuffled with a shuffle buffer of `datasets`, which "
                f"gives other rows after a restart; remove .shuffle(buffer_size=...): pretrain_lib "
                f"shuffles documents and windows itself"
            )

    def identity(self, *, content: bool = True) -> dict:  # noqa: ARG002 (identified by its name)
        """Return what determines the documents of this source."""
        return {"name": self.name}

    def estimated_bytes(self) -> int | None:
        """Return the size of the text in bytes as stated by the dataset, or None."""
        return self.dataset.info.dataset_size or self.dataset.info.download_size

    def units(self, *, cut_text: bool = True) -> list[tuple[int, int]]:  # noqa: ARG002 (no files)
        """Return `(shard, number of shards)` for each unit."""
        rows = self._rows()
        count = min(_count_shards(rows), MAX_UNITS) if self._is_by_row() else 1
        return [(index, count) for index in range(count)]

    def unit_bytes(self, unit: tuple[int, int]) -> int:
        """Return the approximate size of a unit's text in bytes, 0 if unknown."""
        return (self.estimated_bytes() or 0) // unit[1]

    def documents(self, unit: tuple[int, int]) -> Iterator[Document | Rejected]:
        """Yield the documents of a unit, including empty ones; a row without text is `Rejected`."""
        index, count = unit
        rows = self._rows()
        if self._is_by_row():
            rows = rows.shard(num_shards=count, index=index, contiguous=True)
        for number, row in enumerate(rows):
            where = f"{self.name}, row {number} of unit {index}"
            yield self._document(row.get(self.text_field, False), where)

    def _document(self, value: Any, where: str) -> Document | Rejected:
        """Return the document of a value of the column; as in `.parquet`, bytes are UTF-8."""
        try:
            text = value.decode() if isinstance(value, bytes) else value
        except UnicodeDecodeError as error:
            return Rejected(where, "the text is not UTF-8", error.reason)
        text = "" if text is None else text  # a column may hold nulls
        if not is_text(text):
            return Rejected(where, f"no text in data.text_field={self.text_field!r}")
        return Document(text)

    def _columns(self) -> list[str]:
        """Return the columns of the rows that the dataset gives; none where that is not known."""
        form = getattr(self.dataset, "format", None)
        if form is None:  # it is iterated
            return self.dataset.column_names or []
        if form["type"] == "custom":
            return list(self._first_row()) if len(self.dataset) else []
        return self.dataset.column_names if form["output_all_columns"] else form["columns"]

    def _first_row(self) -> dict:
        try:
            return self.dataset[0]
        except TypeError as error:
            raise ValueError(
                f"data.source={self.name}: the transform of this dataset makes no row "
                f"({in_line(error)}); let it return a dict of lists, with a value for each row"
            ) from error

    def _steps(self) -> list[Any]:
        """Return the steps of the dataset's chain of iterables; none for a `Dataset`."""
        steps = [step for step in [getattr(self.dataset, "_ex_iterable", None)] if step is not None]
        for step in steps:
            inner = getattr(step, "ex_iterable", None), *(getattr(step, "ex_iterables", None) or ())
            steps.extend(part for part in inner if part is not None)
        return steps

    def _is_by_row(self) -> bool:
        """Return whether the shards of the dataset, one after the other, are known to be it."""
        rows = self.dataset
        begun = ("epoch", "_distributed", "_starting_state_dict")  # where it begins, and with what
        return not any(getattr(rows, name, None) for name in begun) and all(
            type(step).__name__ in BY_ROW and not any(getattr(step, o, False) for o in NOT_BY_ROW)
            for step in self._steps()
        )

    def _rows(self) -> Any:
        rows = self.dataset
        if hasattr(rows, "to_iterable_dataset"):
            if rows.format["type"] == "custom" or not len(rows):
                return rows  # `datasets` iterates neither; a transform is applied to each row
            rows = rows.with_format(None)
            rows = rows.to_iterable_dataset(num_shards=_count_shards(rows))
        rows = rows.select_columns([self.text_field]) if rows.column_names else rows
        rows = rows.with_format(None)
        if self._is_by_row():
            return rows.reshard()
        rows.set_epoch(self.dataset.epoch)
        rows.load_state_dict(getattr(self.dataset, "_starting_state_dict", None))
        return rows


def _count_shards(rows: Any) -> int:
    """Return into how many parts the rows of a dataset are split."""
    is_iterated = not hasattr(rows, "to_iterable_dataset")
    return rows.num_shards if is_iterated else max(1, len(rows) // UNIT_ROWS)


@dataclass(frozen=True)
class HubSource:
    """The `train` split of a Hub dataset, `OWNER/NAME[:CONFIG][@REVISION]`, in streaming mode.

    Only tokens are written to disk. Pin a revision if the dataset may change before a restart.
    """

    name: str
    text_field: str

    def identity(self, *, content: bool = True) -> dict:  # noqa: ARG002 (identified by its name)
        """Return what determines the documents of this source."""
        return {"name": self.name, "split": "train"}

    def estimated_bytes(self) -> int | None:
        """Return the size of the text in bytes as stated by the Hub, or None."""
        return self._open().estimated_bytes()

    def units(self, *, cut_text: bool = True) -> list[tuple[int, int]]:
        """Return `(shard, number of shards)` for each unit."""
        return self._open().units(cut_text=cut_text)

    def unit_bytes(self, unit: tuple[int, int]) -> int:  # noqa: ARG002 (would cost a request)
        """Return 0: the size of a unit's text is unknown."""
        return 0

    def documents(self, unit: tuple[int, int]) -> Iterator[Document | Rejected]:
        """Yield the documents of a unit, including empty ones; a row without text is `Rejected`."""
        return self._open().documents(unit)

    def _open(self) -> DatasetSource:
        return _load_from_hub(self.name, self.text_field)


class _Nowhere(io.RawIOBase):
    """A file that keeps nothing: a dataset in memory may be large."""

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:
        return len(data)


def check_workers(sources: Sequence[Any], workers: int) -> None:
    """Raise ValueError if there are several workers and a dataset cannot be sent to them."""
    for source in sources if workers > 1 else ():
        if not isinstance(source, DatasetSource):
            continue
        try:
            ForkingPickler(_Nowhere()).dump(source)
        except Exception as error:  # pickle raises many types
            raise ValueError(
                f"data.source={source.name} cannot be sent to {workers} worker processes "
                f"({str(error).splitlines()[0]}): write the function given to .map, .filter or "
                f".with_transform as a named function of a module, or use workers=1"
            ) from error


@lru_cache  # loading sends requests to the Hub
def _load_from_hub(name: str, text_field: str) -> DatasetSource:
    from datasets import load_dataset

    path, config, revision = HUB_NAME.fullmatch(name).groups()
    try:
        rows = load_dataset(path, config, split="train", revision=revision, streaming=True)
    except Exception as error:  # datasets and huggingface_hub raise many types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = without_queries(reason)
        raise ValueError(
            f"data.source={name} is no file or folder here, and could not be loaded from the "
            f"Hugging Face Hub ({reason}). Without a network, use local files (--data.source "
            f"corpus.jsonl), a folder that `pretrain prepare` made elsewhere (--data.path FOLDER), "
            f"or python-stdlib (--data.source {EMBEDDED_CORPUS})"
        ) from error
    return DatasetSource(rows, name, text_field)
