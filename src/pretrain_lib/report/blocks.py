"""The parts of a report, independent of HTML and Markdown."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Table:
    """A table; all texts are plain."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[int, ...] = ()
    """The columns that are aligned on the right."""


@dataclass(frozen=True)
class Sample:
    """A text written by a model, after a prompt."""

    prompt: str
    text: str


@dataclass(frozen=True)
class Samples:
    """What a model wrote at one step."""

    title: str
    samples: tuple[Sample, ...]
    is_open: bool
    """Whether it is shown at once, where the others are folded."""


@dataclass(frozen=True)
class Charts:
    """The place of the charts of one group: "curves" or "scores"."""

    group: str


@dataclass(frozen=True)
class Note:
    """A remark in small letters, with the address of its source."""

    text: str
    url: str


Block = str | Table | Samples | Charts | Note  # a str is a paragraph


@dataclass(frozen=True)
class Section:
    """A part of a report with a title of its own."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Report:
    """A whole report."""

    title: str
    line: str
    """What stands below the title."""
    facts: tuple[tuple[str, str, str], ...]
    """The key figures, as `(label, value, remark)`; none where several runs are compared."""
    sections: tuple[Section, ...]


def side_by_side(
    names: Sequence[str], things: Sequence[T], facts: Callable[[T], Mapping[str, str]]
) -> Table:
    """Return a table with a row for each fact and a column for each thing, empty rows left out."""
    columns = [facts(thing) for thing in things]
    labels = dict.fromkeys(label for column in columns for label in column)
    rows = [(label, *(column.get(label, "") for column in columns)) for label in labels]
    header = ("", *names) if len(names) > 1 else ("", "")
    return Table(header, tuple(row for row in rows if any(row[1:])))


def singular(unit: str) -> str:
    """Return the singular of a unit: "token", "process"."""
    return unit.removesuffix("es") if unit.endswith("sses") else unit.removesuffix("s")
