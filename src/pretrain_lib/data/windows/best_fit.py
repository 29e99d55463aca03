"""Best-fit packing: plan which documents share a window, so that only long ones are cut.

After Ding et al. 2024, "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830). A document
of more than T tokens is cut into pieces of T tokens and a remainder. The pieces, which are never
cut again, are packed into windows of T tokens, and the rest of a window is padding. A plan is made
once and kept on disk as two arrays: the pieces in window order, and the end of each window in them.
"""

import hashlib
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np

from pretrain_lib.data.block_cache import cache_folder
from pretrain_lib.data.tokens.handle import Handle
from pretrain_lib.data.tokens.places import Place
from pretrain_lib.files.locks import is_locked, lock_folder
from pretrain_lib.files.writes import staged, write_json

Packing = Literal["concat", "best_fit"]
FORMAT_VERSION = 1
PACKING_FOLDER = "packing"  # where plans are kept
POLL_SECONDS = 0.5
GROUP_PIECES = 2**20  # packed at a time, to bound memory; changing it changes the plans
PIECE = np.dtype([("start", "<u8"), ("length", "<u4")])
BIN_END = np.dtype("<u8")


def pack_best_fit(lengths: np.ndarray, *, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack pieces into bins by best-fit decreasing (Ding et al. 2024, arXiv 2404.10830).

    Pieces are placed in order of decreasing length, ties by index, each into the bin with the least
    remaining room that fits it, ties to the oldest bin, or into a new bin. Returns `order`, int64
    `(pieces,)`: indices into `lengths`, bin by bin and ascending within a bin; and `bin_ends`,
    int64 `(bins,)`: the index in `order` after each bin's last piece.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    assert not len(lengths) or 1 <= lengths.min() <= lengths.max() <= capacity
    longest_first = np.argsort(-lengths, kind="stable")
    bin_of, num_bins = np.empty(len(lengths), dtype=np.int64), 0
    bins_with = defaultdict(list)  # remaining room -> arrays of bins
    exists = np.zeros(capacity + 1, dtype=bool)  # whether a bin has this room; a new one always can
    exists[capacity] = True
    for pieces in np.split(longest_first, np.flatnonzero(np.diff(lengths[longest_first])) + 1):
        while len(pieces):
            length = int(lengths[pieces[0]])
            room = length + int(exists[length:].argmax())
            # After taking one of these equal pieces a bin has even less room, so it is also the
            # best fit for the next: it takes as many as fit before another bin takes any.
            each = room // length
            used = -(-len(pieces) // each)
            if room == capacity:
                bins = np.arange(num_bins, num_bins + used)
                num_bins += used
            else:
                parts, exists[room] = bins_with.pop(room), False
                bins = parts[0] if len(parts) == 1 else np.sort(np.concatenate(parts))
                used = min(used, len(bins))
            placed, pieces = np.split(pieces, [used * each])
            bin_of[placed] = np.repeat(bins[:used], each)[: len(placed)]
            full, last, untouched = np.split(bins, [used - 1, used])
            left_in_last = room - (len(placed) - len(full) * each) * length
            for left, group in ((room % length, full), (left_in_last, last), (room, untouched)):
                if len(group):
                    bins_with[left].append(group)
                    exists[left] = True
    return np.argsort(bin_of, kind="stable"), np.cumsum(np.bincount(bin_of))


@dataclass(frozen=True)
class PackingReport:
    """The totals of a plan."""

    sequence_length: int
    windows: int
    tokens: int  # each in exactly one window
    padded_tokens: int
    documents: int  # not counting empty ones
    cut_documents: int
    pieces: int

    @property
    def padded_share(self) -> float:
        """The share of positions that are padding."""
        return self.padded_tokens / (self.windows * self.sequence_length)

    @property
    def cut_share(self) -> float:
        """The share of documents that are longer than a window, and so cut."""
        return self.cut_documents / self.documents


@dataclass(frozen=True)
class BestFitPlan:
    """A best-fit packing (Ding et al. 2024, arXiv 2404.10830) on disk, read window by window."""

    pieces_file: Handle
    bins_file: Handle
    report: PackingReport

    @property
    def sequence_length(self) -> int:
        """The number of tokens in a window."""
        return self.report.sequence_length

    @property
    def num_windows(self) -> int:
        """The number of windows."""
        return self.report.windows

    def pieces(self, window: int) -> np.ndarray:
        """Return the `start` and `length` in tokens of a window's pieces: `PIECE`, `(pieces,)`.

        Starts ascend; lengths sum to at most `sequence_length`. Read from disk on every call.
        """
        assert 0 <= window < self.num_windows, f"window {window} is outside the plan"
        before = min(window, 1)  # no window ends where the first one begins
        raw = self.bins_file.read((window - before) * BIN_END.itemsize, 2 * BIN_END.itemsize)
        ends = [0, *np.frombuffer(raw, BIN_END).tolist()]
        first, last = ends[before : before + 2]
        raw = self.pieces_file.read(first * PIECE.itemsize, (last - first) * PIECE.itemsize)
        return np.frombuffer(raw, PIECE)


def plan_folder(place: Place) -> Path:
    """Return where the plans of a path are kept: in its folder, or in the cache of the machine."""
    if isinstance(place, Path) and place.is_dir() and os.access(place, os.W_OK):
        return place / PACKING_FOLDER
    return cache_folder() / PACKING_FOLDER


def plan_name(fingerprint: str, sequence_length: int) -> str:
    """Return the name of the file that commits a plan."""
    return f"best_fit-T{sequence_length}-{fingerprint[:12]}.json"


def open_plan(
    document_ends: Callable[[], Iterator[np.ndarray]],
    num_tokens: int,
    folder: Path | str,
    *,
    fingerprint: str,
    sequence_length: int,
) -> BestFitPlan:
    """Open the best-fit plan (Ding et al. 2024, arXiv 2404.10830) of a token array, or make it.

    `document_ends()` yields integer arrays of ascending indices, each after a document's last
    token; tokens after the last end are one more document. `fingerprint` identifies the array. A
    plan in `folder` for this fingerprint and `sequence_length` is verified by its hashes and
    reused; one that another process is making is waited for. Raises ValueError if there are no
    tokens, or if a plan in `folder` is damaged.
    """
    if num_tokens == 0:
        raise ValueError("data.packing=best_fit needs documents with tokens: data.path has none")
    folder = Path(folder)
    record_path = folder / plan_name(fingerprint, sequence_length)
    paths = [record_path.with_suffix(suffix) for suffix in (".pieces", ".bins", ".json")]
    identity = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "sequence_length": sequence_length,
        "tokens": num_tokens,
    }
    while not all(path.is_file() for path in paths):
        try:
            with lock_folder(folder, setting="data.path"):
                if not all(path.is_file() for path in paths):  # not made by another meanwhile
                    _build(document_ends(), *paths, identity)
        except ValueError:
            if not is_locked(folder):
                raise
            time.sleep(POLL_SECONDS)
    return _open_checked(*paths, identity)


def _build(
    document_ends: Iterator[np.ndarray], pieces: Path, bins: Path, record_path: Path, identity: dict
) -> None:
    length, counts = identity["sequence_length"], Counter()
    temporary = {path: staged(path) for path in (pieces, bins)}
    with temporary[pieces].open("wb") as pieces_file, temporary[bins].open("wb") as bins_file:
        for group in _piece_groups(document_ends, identity["tokens"], length, counts):
            order, bin_ends = pack_best_fit(group["length"], capacity=length)
            pieces_file.write(group[order].tobytes())
            bins_file.write((bin_ends + counts["pieces"]).astype(BIN_END).tobytes())
            counts.update(pieces=len(order), windows=len(bin_ends))
        for file in (pieces_file, bins_file):
            file.flush()
            os.fsync(file.fileno())
    counts.update(padded_tokens=counts["windows"] * length - identity["tokens"])
    record = identity | dict(counts)
    record["sha256"] = {path.suffix: _sha256(temporary[path]) for path in temporary}
    # A crash may leave any subset of these files: open_plan rebuilds the plan if one is missing.
    for path in temporary:
        temporary[path].replace(path)
    write_json(record_path, record | {"record_sha256": _record_sha256(record)})


def _piece_groups(
    document_ends: Iterator[np.ndarray], num_tokens: int, sequence_length: int, counts: Counter
) -> Iterator[np.ndarray]:
    """Yield the pieces of all documents in order, `GROUP_PIECES` at a time.

    The groups do not depend on how `document_ends` is split into arrays. Adds the numbers of
    documents and of cut documents to `counts`.
    """
    group, missing, last_end = [], GROUP_PIECES, 0
    for ends in chain(document_ends, [np.array([num_tokens])]):
        bounds = np.append(last_end, ends.astype(np.int64))
        starts, lengths, last_end = bounds[:-1], np.diff(bounds), bounds[-1]
        assert lengths.min(initial=0) >= 0, f"document ends fall, between {bounds[0]} and {ends}"
        starts, lengths = starts[lengths > 0], lengths[lengths > 0]
        num_cut = int((lengths > sequence_length).sum())
        counts.update(documents=len(lengths), cut_documents=num_cut)
        # The number of pieces before each document.
        until = np.append(0, np.cumsum(-(-lengths // sequence_length)))
        done = 0
        while done < until[-1]:
            index = np.arange(done, min(done + missing, until[-1]))
            document = np.searchsorted(until, index, side="right") - 1
            skipped = (index - until[document]) * sequence_length
            pieces = np.empty(len(index), dtype=PIECE)
            pieces["start"] = starts[document] + skipped
            pieces["length"] = np.minimum(lengths[document] - skipped, sequence_length)
            group.append(pieces)
            done, missing = done + len(index), missing - len(index)
            if not missing:
                yield np.concatenate(group)
                group, missing = [], GROUP_PIECES
    if group:
        yield np.concatenate(group)


def _open_checked(pieces: Path, bins: Path, record_path: Path, identity: dict) -> BestFitPlan:
    remedy = "delete it so that it is built again"
    try:
        record = json.loads(record_path.read_bytes())
        intact = record.pop("record_sha256") == _record_sha256(record)
    except (ValueError, KeyError):
        intact = False
    if not intact or not identity.items() <= record.items():
        raise ValueError(f"{record_path}: damaged, or not a plan for {identity}; {remedy}")
    for path in (pieces, bins):
        if _sha256(path) != record["sha256"][path.suffix]:
            raise ValueError(f"{path}: its bytes differ from what was written; {remedy}")
    names = [field.name for field in fields(PackingReport)]
    report = PackingReport(**{name: record[name] for name in names})
    return BestFitPlan(Handle(pieces), Handle(bins), report)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _record_sha256(record: dict) -> str:
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()
