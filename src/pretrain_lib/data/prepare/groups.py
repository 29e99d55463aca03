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
from pretrain_lib.data.prepare.holdout import (
    HeldOut,
    count_first_bytes,
    hash_fraction,
    parse_validation,
)
from pretrain_lib.data.prepare.left_out import Report
from pretrain_lib.data.prepare.loss_spans import Spans, mask_tokens
from pretrain_lib.data.text.encoder import Encoder, load_encoder
from pretrain_lib.data.text.sources import Source

GROUP_BYTES = 64 * 2**20  # of text
BATCH_BYTES = 4 * 2**20  # of text, encoded at once


@dataclass(frozen=True)
class UnitTask:
    """What a worker needs to tokenize one unit."""

    source: Source
    unit: Any
    name: str
    """Part of the key that shuffles the unit's documents."""
    tokenizer_folder: Path
    package: str
    cuts_text: bool
    validation: str
    held_out: HeldOut
    max_rejected: int
    has_spans: bool = False
    """Whether the spans of a text that count as targets are known."""

    def load_encoder(self) -> Encoder:
        """Load the encoder, which each process caches."""
        return load_encoder(self.tokenizer_folder, package=self.package, cuts_text=self.cuts_text)


@dataclass
class Group:
    """Documents of one unit and one split, in the order in which they are written."""

    split: str
    name: str
    texts: list[bytes] = field(default_factory=list)
    """The UTF-8 text of each document."""
    spans: list[Spans | None] = field(default_factory=list)
    """What counts as a target in each document, None for all of it."""
    text_bytes: int = 0
    begins: bool = True
    last_ends: bool = True
    """Whether the documents are complete, rather than one part of a large file."""
    skipped_tokens: int = 0
    """How many tokens of the first document are held out."""


def gather_groups(task: UnitTask, report: Report) -> Iterator[Group]:
    """Yield the documents of a unit in groups of bounded size.

    Blank and unreadable documents are left out and counted in `report`. Raises ValueError if more
    than `task.max_rejected` cannot be read.
    """
    kind, share = parse_validation(task.validation)
    open_groups: dict[str, Group] = {}
    numbers = {"train": 0, "validation": 0}
    for position, document in enumerate(task.source.documents(task.unit)):
        if not report.count_document(document):
            report.check(task.max_rejected)
            continue
        if position < task.held_out.documents:
            continue
        text = document.text.encode()
        held_out = kind == "hash" and hash_fraction(document.digest or text) < share
        split = "validation" if held_out else "train"
        if split not in open_groups:
            name = f"{split}-{task.name}-{numbers[split]:03d}"
            open_groups[split], numbers[split] = Group(split, name), numbers[split] + 1
        group = open_groups[split]
        if position == task.held_out.documents:
            group.skipped_tokens = task.held_out.tokens
        group.texts.append(text)
        group.spans.append(document.spans)
        group.text_bytes += len(text)
        if not (document.begins and document.ends):
            group.begins, group.last_ends = document.begins, document.ends
        whole = group.begins and group.last_ends
        assert whole or len(group.texts) == 1, "a part of a document is a group of its own"
        if group.text_bytes >= GROUP_BYTES:
            yield _shuffled(open_groups.pop(split))
    for group in open_groups.values():
        yield _shuffled(group)


def _shuffled(group: Group) -> Group:
    """Shuffle a group's documents; a first document whose start is held out stays first."""
    first = 1 if group.skipped_tokens else 0
    rest = group.texts[first:]
    order = _draw_order(len(rest), derive_keys("documents", group.name))
    group.texts[first:] = [rest[i] for i in order.tolist()]
    group.spans[first:] = [group.spans[first + i] for i in order.tolist()]
    return group


def _draw_order(size: int, keys: np.ndarray) -> np.ndarray:
    """Return `permute` of all of `range(size)`, by far fewer operations for a small one."""
    domain = 4 ** (((size - 1).bit_length() + 1) // 2 or 1)
    table = permute(np.arange(domain), size=domain, keys=keys)
    order = table[:size]
    while (outside := order >= size).any():
        order = np.where(outside, table[order], order)
    return order


def encode_group(task: UnitTask, group: Group) -> tuple[np.ndarray, np.ndarray]:
    """Tokenize the documents of a group, updating the progress bar.

    Returns their ids one after the other, and where each document ends (int64).
    """
    encoder, parts, all_ends, size = task.load_encoder(), [], [], 0
    for texts in _batches(group.texts):
        ids, ends = encoder.encode(texts, begins=group.begins)
        parts.append(ids)
        all_ends.append(ends + size)
        size += len(ids)
        count(documents=len(texts), tokens=len(ids), text_bytes=sum(map(len, texts)))
    if len(parts) > 1:
        parts, all_ends = [np.concatenate(parts)], [np.concatenate(all_ends)]
    (tokens,), (ends,) = parts, all_ends
    if group.skipped_tokens:
        held_out, begins = tokens[: group.skipped_tokens], group.begins
        group.text_bytes -= count_first_bytes(encoder.tokenizer, held_out, begins=begins)
        tokens, ends = tokens[group.skipped_tokens :], ends - group.skipped_tokens
    return tokens, ends


def mask_group(
    task: UnitTask, group: Group, tokens: np.ndarray, ends: np.ndarray
) -> np.ndarray | None:
    """Return which tokens of an encoded group count as targets, None if there are no spans."""
    if not task.has_spans:
        return None
    return mask_tokens(task.load_encoder().tokenizer, tokens, ends, group.texts, group.spans)


def _batches(texts: list[bytes]) -> Iterator[list[bytes]]:
    start = size = 0
    for stop, text in enumerate(texts, start=1):
        size += len(text)
        if size >= BATCH_BYTES or stop == len(texts):
            yield texts[start:stop]
            start, size = stop, 0
