"""Split a unit of a source into groups of documents that fit in memory, and tokenize them.

The content of a group depends only on the unit, so any process can produce it, any number of times.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pretrain_lib.data.permutation import derive_keys, permute
from pretrain_lib.data.pool import count
from pretrain_lib.data.prepare.holdout import HeldOut, hash_fraction, parse_validation
from pretrain_lib.data.text.encoder import Encoder, load_encoder
from pretrain_lib.data.text.formats import Document, Rejected
from pretrain_lib.data.text.sources import Source
from pretrain_lib.wording import plural

GROUP_BYTES = 64 * 2**20  # of text
COUNT_EVERY_BYTES = 2**20  # of text, between updates of the progress bar
EXAMPLES = 3  # how many rejected documents are reported


@dataclass(frozen=True)
class UnitTask:
    """What a worker needs to tokenize one unit."""

    source: Source
    unit: Any
    name: str
    """Part of the key that shuffles the unit's documents."""
    tokenizer_folder: Path
    fast: bool
    cuts_text: bool
    validation: str
    held_out: HeldOut
    max_rejected: int

    def load_encoder(self) -> Encoder:
        """Load the encoder, which each process caches."""
        return load_encoder(self.tokenizer_folder, fast=self.fast, cuts_text=self.cuts_text)


@dataclass
class Group:
    """Documents of one unit and one split, in the order in which they are written."""

    split: str
    name: str
    documents: list[Document]
    text_bytes: int
    skipped_tokens: int = 0
    """How many tokens of the first document are held out."""

    @property
    def last_ends(self) -> bool:
        """Whether the last document is complete, rather than a part of a large file."""
        return self.documents[-1].ends


@dataclass
class Report:
    """Counts of the documents that are not written, with examples."""

    empty: int = 0
    rejected: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, other: "Report") -> None:
        """Add the report of another unit."""
        self.empty += other.empty
        self.rejected += other.rejected
        self.examples = (self.examples + other.examples)[:EXAMPLES]

    def check(self, max_rejected: int) -> None:
        """Raise ValueError if more documents than `max_rejected` could not be read."""
        if self.rejected > max_rejected:
            documents = plural(self.rejected, "document")
            raise ValueError(
                f"{documents} could not be read, more than data.max_rejected="
                f"{max_rejected}; fix them or raise the limit. {'; '.join(self.examples)}"
            )


def gather_groups(task: UnitTask, report: Report) -> Iterator[Group]:
    """Yield the documents of a unit in groups of bounded size.

    Blank and unreadable documents are left out and counted in `report`. Raises ValueError if more
    than `task.max_rejected` cannot be read.
    """
    kind, share = parse_validation(task.validation)
    open_groups: dict[str, Group] = {}
    numbers = {"train": 0, "validation": 0}
    for position, document in enumerate(task.source.documents(task.unit)):
        has_text = _has_text(document, report)
        report.check(task.max_rejected)
        if position < task.held_out.documents or not has_text:
            continue
        split = "validation" if kind == "hash" and hash_fraction(document) < share else "train"
        if split not in open_groups:
            name = f"{split}-{task.name}-{numbers[split]:03d}"
            open_groups[split], numbers[split] = Group(split, name, [], 0), numbers[split] + 1
        group = open_groups[split]
        if position == task.held_out.documents:
            group.skipped_tokens = task.held_out.tokens
        group.documents.append(document)
        group.text_bytes += len(document.text.encode())
        if group.text_bytes >= GROUP_BYTES:
            yield _shuffled(open_groups.pop(split))
    for group in open_groups.values():
        yield _shuffled(group)


def _has_text(document: Document | Rejected, report: Report) -> bool:
    if isinstance(document, Rejected):
        report.add(Report(rejected=1, examples=[f"{document.where}: {document.reason}"]))
        return False
    report.empty += document.is_blank
    return not document.is_blank


def _shuffled(group: Group) -> Group:
    """Shuffle a group's documents; a first document whose start is held out stays first."""
    first = 1 if group.skipped_tokens else 0
    rest = group.documents[first:]
    order = permute(np.arange(len(rest)), size=len(rest), keys=derive_keys("documents", group.name))
    group.documents[first:] = [rest[i] for i in order]
    assert len(group.documents) == 1 or all(d.begins and d.ends for d in group.documents)
    return group


def encode_group(task: UnitTask, group: Group) -> list[np.ndarray]:
    """Tokenize the documents of a group, updating the progress bar."""
    encoded, tokens, text_bytes, documents = [], 0, 0, 0
    for document, ids in zip(
        group.documents, task.load_encoder().encode(group.documents), strict=True
    ):
        encoded.append(ids)
        documents, tokens = documents + 1, tokens + len(ids)
        text_bytes += len(document.text.encode())
        if text_bytes >= COUNT_EVERY_BYTES:
            count(documents=documents, tokens=tokens, text_bytes=text_bytes)
            documents = tokens = text_bytes = 0
    count(documents=documents, tokens=tokens, text_bytes=text_bytes)
    if group.skipped_tokens:
        encoded[0] = encoded[0][group.skipped_tokens :]
        group.text_bytes -= len(group.documents[0].text.encode())
        group.text_bytes += len(task.load_encoder().tokenizer.decode(encoded[0]).encode())
    return encoded


def describe_left_out(report: dict) -> Iterator[str]:
    """Yield lines about the documents that `pretrain prepare` left out, if any."""
    if report["empty"] or report["rejected"]:
        empty = plural(report["empty"], "empty document")
        yield f"left out    {empty}, {report['rejected']:,} unreadable"
    for example in report["examples"]:
        yield f"            {example}"
