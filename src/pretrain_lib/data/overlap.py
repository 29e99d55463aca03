"""Measure the overlap of evaluation items with a training corpus by word n-grams.

The contamination test of Brown et al. (2020), appendix C: an item overlaps if 13 consecutive words
of it occur in the corpus. Words are lower-cased runs of letters and digits, in Unicode's form NFC;
all else is ignored. The test says little about scripts without spaces.
"""

import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pretrain_lib.data.overlap_items import read_records
from pretrain_lib.data.pool import run_tasks
from pretrain_lib.data.text.documents import Rejected
from pretrain_lib.data.text.opening import open_source
from pretrain_lib.data.text.sources import FileSource, Source
from pretrain_lib.files.writes import write_json
from pretrain_lib.wording import show_path

PIECE_CHARACTERS, PIECES_AT_ONCE = 2**13, 256  # documents are split and looked up in pieces
WORST_SHOWN = 10
WORD, GAP = re.compile(r"[^\W_]+"), re.compile(r"[\W_]")  # in any script


@dataclass(frozen=True)
class ItemOverlap:
    """An overlapping item, with its first overlapping n-gram and where that first occurs."""

    line: int  # in the items file, from 1
    ngrams: int  # distinct
    overlapping_ngrams: int
    example: str
    source: str
    unit: int  # index in `source.units()`
    document: int  # index in `source.documents(unit)`
    file: str | None  # None if the source is not local files


@dataclass
class FileOverlap:
    """The overlap of the items of one file; n-gram counts are summed over the items."""

    path: str
    items: int = 0
    tested: int = 0  # items with at least one string of n words
    overlapping: int = 0
    ngrams: int = 0
    overlapping_ngrams: int = 0
    overlaps: list[ItemOverlap] = field(default_factory=list)


@dataclass
class SourceRead:
    """How many documents of a source were searched."""

    name: str
    documents: int = 0
    rejected: int = 0  # documents that could not be read
    first_rejected: str | None = None


@dataclass(frozen=True)
class OverlapReport:
    """The overlap of each items file with the sources."""

    ngram: int  # in words
    fields: list[str]  # fields of the items that were tested; all if empty
    sources: list[SourceRead]
    files: list[FileOverlap]


@dataclass(frozen=True)
class _NGrams:
    """Ids, from 1, for the words and n-grams of the items; any other word or n-gram has id 0.

    Pairs of words get ids, then pairs of pairs, up to n words. Unlike hashes, ids never collide.
    """

    ngram: int
    words: dict[str, int] = field(default_factory=dict)
    levels: list[np.ndarray] = field(default_factory=list)  # known pairs per level: int64, sorted

    def number(self, ids: np.ndarray, *, learn: bool = False) -> np.ndarray:
        """Return the id of the n-gram that begins at each word: `(words - n + 1,)`."""
        width = 1
        for level in range((self.ngram - 1).bit_length()):
            step = min(width, self.ngram - width)  # the two halves of the last level may overlap
            left, right = ids[:-step], ids[step:]
            at = np.flatnonzero((left > 0) & (right > 0))
            pairs = left[at] << 32 | right[at]
            ids = np.zeros(len(left), dtype=np.int64)
            if learn:
                sorted_pairs, index = np.unique(pairs, return_inverse=True)
                self.levels.append(sorted_pairs)
            else:
                sorted_pairs = self.levels[level]
                index = np.minimum(np.searchsorted(sorted_pairs, pairs), len(sorted_pairs) - 1)
            ids[at] = np.where(sorted_pairs[index] == pairs, index + 1, 0)
            width += step
        return ids


def find_overlap(
    sources: Sequence[str],
    items: Sequence[Path],
    *,
    ngram: int = 13,
    text_field: str = "text",
    document_separator: str | None = None,
    fields: Sequence[str] = (),
    workers: int = 1,
    quiet: bool = False,
) -> OverlapReport:
    """Search the documents of `sources` for n-grams of the items in `items`, JSON Lines files.

    Each string of an item, at any depth or only in `fields`, is tested on its own. A part of a
    document that a source splits is a document. Raises ValueError for what cannot be tested.
    """
    if ngram < 1:
        raise ValueError(f"ngram={ngram} must be at least 1 word")
    if not sources:
        raise ValueError("sources is empty: name at least one to search")
    opener = partial(open_source, text_field=text_field, document_separator=document_separator)
    opened = [opener(name) for name in sources]
    ngrams = _NGrams(ngram)
    files, tested, ids = _read_items(items, fields, ngrams)
    numbers, words = ngrams.number(ids, learn=True), list(ngrams.words)
    places, read = _search(opened, ngrams, workers=workers, quiet=quiet)
    for file, line, part in tested:
        here = numbers[part].tolist()
        distinct = dict.fromkeys(number for number in here if number)
        file.ngrams += len(distinct)
        if overlapping := [number for number in distinct if number in places]:
            first = part.start + here.index(overlapping[0])
            example = " ".join(words[i - 1] for i in ids[first : first + ngram])
            place, hits = places[overlapping[0]], len(overlapping)
            file.overlaps.append(ItemOverlap(line, len(distinct), hits, example, *place))
            file.overlapping += 1
            file.overlapping_ngrams += hits
    return OverlapReport(ngram, list(fields), read, files)


def format_overlap(report: OverlapReport) -> str:
    """Format a report: documents searched, a table of items files, the most overlapping items."""
    lines = []
    for source in report.sources:
        rejected = f"; {source.rejected:,} cannot be read, the first: {source.first_rejected}"
        read = f"{source.name}: documents searched: {source.documents:,}"
        lines += [read + (rejected if source.rejected else "")]
    width = max(len(file.path) for file in report.files)
    lines += ["", f"{'':{width}}  {'items':>9}  {'tested':>9}  {'overlapping':>11}  {'share':>7}"]
    for file in report.files:
        numbers = f"{file.items:>9,}  {file.tested:>9,}  {file.overlapping:>11,}"
        share = f"{file.overlapping / file.tested:.2%}" if file.tested else "-"
        lines += [f"{file.path:{width}}  {numbers}  {share:>7}"]
    n = report.ngram
    lines += [f"tested: {n} words or more in one string; overlapping: {n} in a row in one document"]
    pairs = [(file.path, item) for file in report.files for item in file.overlaps]
    pairs.sort(key=lambda pair: (-pair[1].overlapping_ngrams / pair[1].ngrams, -pair[1].ngrams))
    if pairs:
        lines += ["", f"{min(WORST_SHOWN, len(pairs))} of {len(pairs):,}, largest share first:"]
    for path, item in pairs[:WORST_SHOWN]:
        lines += [
            f"{path}, line {item.line}: {item.overlapping_ngrams} of {item.ngrams} {n}-grams:",
            f'  "{item.example}"',
            f"  in {item.file or item.source} (unit {item.unit}, document {item.document})",
        ]
    return "\n".join(lines)


def write_overlap(report: OverlapReport, path: Path) -> None:
    """Write a report as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(report))


def _read_items(
    paths: Sequence[Path], fields: Sequence[str], known: _NGrams
) -> tuple[list[FileOverlap], list[tuple], np.ndarray]:
    """Return the files, a `(file, line, slice of word ids)` per tested item, and all word ids.

    New words are added to `known`. The word ids of each string are followed by a 0.
    """
    files, tested, ids, keys = [], [], [], {}
    for path in paths:
        files.append(file := FileOverlap(str(path)))
        for line, record in read_records(path):
            file.items += 1
            keys |= dict.fromkeys(record)
            start = len(ids)
            for string in _strings([record.get(key) for key in fields] if fields else record):
                if len(words := WORD.findall(_normalize(string))) >= known.ngram:
                    ids += [*(known.words.setdefault(w, len(known.words) + 1) for w in words), 0]
            if len(ids) > start:
                file.tested += 1
                tested.append((file, line, slice(start, len(ids))))
    names = ", ".join(map(str, paths))
    if missing := [key for key in fields if key not in keys]:
        rule = f"no record of {names} has this field; they have {', '.join(keys)}"
        raise ValueError(f"fields={', '.join(missing)}: {rule}")
    if not any(file.items for file in files):
        raise ValueError(f"items={names}: no item is in there; give JSON lines, one for each item")
    if not tested:
        rule = f"has a string of ngram={known.ngram} words; give other items or a smaller ngram"
        raise ValueError(f"items={names}: none of {sum(f.items for f in files)} items {rule}")
    return files, tested, np.array(ids, dtype=np.int64)


def _strings(value: Any) -> list[str]:
    """Return all strings within a JSON value, at any depth."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [string for part in inner for string in _strings(part)]


def _search(
    sources: list[Source], known: _NGrams, *, workers: int, quiet: bool
) -> tuple[dict[int, tuple], list[SourceRead]]:
    """Return the first `(source, unit, document, file)` of each n-gram found, and what was read."""
    units = [(s, *unit) for s, source in enumerate(sources) for unit in enumerate(source.units())]
    tasks = ((known, sources[s], unit) for s, _, unit in units)
    scans = run_tasks(_scan_unit, tasks, workers=workers)
    hide = quiet or not sys.stderr.isatty()
    bar = tqdm(zip(units, scans, strict=True), "search", len(units), unit="unit", disable=hide)
    places, read = {}, [SourceRead(show_path(source.name)) for source in sources]
    for (s, u, _), (first, documents, rejected) in bar:
        for number, place in first.items():
            places.setdefault(number, (read[s].name, u, *place))
        read[s].documents += documents
        read[s].rejected += len(rejected)
        read[s].first_rejected = read[s].first_rejected or next(iter(rejected), None)
    for source in read:
        if not source.documents:
            reason = source.first_rejected or "it has none"
            raise ValueError(f"data.source={source.name}: no document can be read: {reason}")
    return places, read


def _scan_unit(task: tuple[_NGrams, Source, Any]) -> tuple[dict[int, tuple], int, list[str]]:
    """Return where known n-grams first occur in a unit, its document count, and the rejected."""
    ngrams, source, unit = task
    first, files, rejected = {}, [], []
    pieces = _read_pieces(source, unit, files, rejected)
    ids, owners = np.zeros((2, 0), dtype=np.int64)
    while batch := list(islice(pieces, PIECES_AT_ONCE)):
        lengths = [len(words) for _, words in batch]
        words = chain.from_iterable(words for _, words in batch)
        new = np.fromiter(map(ngrams.words.get, words, repeat(0)), np.int64, count=sum(lengths))
        # Keep the last n - 1 words of the previous batch, so that no n-gram is split.
        start = max(len(ids) - ngrams.ngram + 1, 0)
        ids = np.concatenate([ids[start:], new])
        owners = np.concatenate([owners[start:], np.repeat([n for n, _ in batch], lengths)])
        numbers = ngrams.number(ids)
        at = np.flatnonzero(numbers)
        hits, index = np.unique(numbers[at], return_index=True)
        for number, owner in zip(hits.tolist(), owners[at[index]].tolist(), strict=True):
            first.setdefault(number, (owner, files[owner]))
    unread = [str(each) for each in rejected if each.documents]  # the others are warnings
    return first, len(files) - len(rejected), unread


def _read_pieces(
    source: Source, unit: Any, files: list[str | None], rejected: list[Rejected]
) -> Iterator[tuple[int, list[str]]]:
    """Yield `(document, words)` piece by piece, then `[""]`; fill `files` and `rejected`."""
    in_files = isinstance(source, FileSource)
    parts = [((piece,), show_path(piece.path)) for piece in unit] if in_files else [(unit, None)]
    for part, file in parts:
        for document in source.documents(part):
            files.append(file)
            if isinstance(document, Rejected):
                rejected.append(document)
                continue
            text, start = _normalize(document.text), 0
            while start < len(text):
                gap = GAP.search(text, start + PIECE_CHARACTERS)
                stop = gap.start() if gap else len(text)
                yield len(files) - 1, WORD.findall(text, start, stop)
                start = stop
            yield len(files) - 1, [""]


def _normalize(text: str) -> str:
    """Return a text in lower case and in Unicode's normal form NFC, which most texts have."""
    if not (text.isascii() or unicodedata.is_normalized("NFC", text)):
        text = unicodedata.normalize("NFC", text)
    return text.lower()
