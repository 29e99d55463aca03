"""The documents of a token array in another order every epoch, before windows are cut from them.

With `data.shuffle=windows` two documents that lie side by side in the array share their windows in
every epoch. With `documents`, each epoch reads the documents in a permutation of its own. The
permutation is a function of (seed, source, epoch), computed where it is needed: memory holds one
number for each `DOCUMENTS_PER_FENCE` documents.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np

from pretrain_lib.data.permutation import derive_keys, permute
from pretrain_lib.data.tokens.arrays import TokenArray
from pretrain_lib.data.windows.best_fit import BestFitPlan

Shuffle = Literal["windows", "documents"]
DOCUMENTS_PER_FENCE = 16
COUNTED_AT_ONCE = 2**20  # documents
# `(begin, low, high)`: tokens `[low, high)` of the array stand at `begin` of the permuted one.
Piece = tuple[int, int, int]


def order_by_epoch(
    shuffle: Shuffle,
    sources: Sequence[TokenArray],
    *,
    seed: int,
    plans: Sequence[BestFitPlan] | None,
) -> list["TokensByEpoch"]:
    """Return for each source what gives its tokens in the order of an epoch.

    Raises ValueError if documents are to be permuted that a plan has packed, or whose ends are not
    known.
    """
    if shuffle == "documents" and plans is not None:
        raise ValueError(
            "data.shuffle=documents does not go with data.packing=best_fit, whose plan fixes what "
            "shares a window; set data.packing=concat or data.shuffle=windows"
        )
    if shuffle == "documents" and not all(source.has_documents for source in sources):
        raise ValueError(
            "data.shuffle=documents needs document ends, which .npy and .bin arrays do not have; "
            "prepare the text with `pretrain prepare`, or set data.shuffle=windows"
        )
    permuted = shuffle == "documents"
    return [TokensByEpoch(source, seed, number, permuted) for number, source in enumerate(sources)]


@dataclass
class TokensByEpoch:
    """A token array in the order of the epoch that is asked for; the last one is kept."""

    array: TokenArray
    seed: int
    source: int
    permuted: bool
    _epoch: int | None = None
    _documents: "ShuffledDocuments | None" = None

    def tokens(self, epoch: int) -> "TokenArray | ShuffledDocuments":
        """Return the tokens of an epoch."""
        if not self.permuted:
            return self.array
        if self._epoch != epoch:
            self._documents = ShuffledDocuments(
                self.array, seed=self.seed, source=self.source, epoch=epoch
            )
            self._epoch = epoch
        return self._documents


class ShuffledDocuments:
    """A token array with its documents permuted; reads like a `TokenArray` of the same length.

    Document j of the array stands at place `permute(j)`. Tokens after the last document end are one
    more document.
    """

    has_documents = True

    def __init__(self, tokens: TokenArray, *, seed: int, source: int, epoch: int) -> None:
        """Permute the documents of source number `source` for an epoch, in one pass over them."""
        self.tokens, self.table = tokens, _DocumentTable(tokens)
        self._keys = derive_keys("document", seed, source, epoch)
        self._fences = self._count_tokens()
        self._last: tuple[tuple[int, int], list[Piece]] = ((0, 0), [])

    def __len__(self) -> int:
        return len(self.tokens)

    def _count_tokens(self) -> np.ndarray:
        """Return the token at which every `DOCUMENTS_PER_FENCE`-th place begins, and the end."""
        sums = np.zeros(-(-self.table.count // DOCUMENTS_PER_FENCE), dtype=np.int64)
        for first, lengths in self.table.iterate_lengths():
            numbers = np.arange(first, first + len(lengths))
            places = permute(numbers, size=self.table.count, keys=self._keys)
            np.add.at(sums, places // DOCUMENTS_PER_FENCE, lengths)
        return np.concatenate([[0], np.cumsum(sums)])

    def read_into(self, start: int, tokens: np.ndarray) -> None:
        """Fill `tokens` `(count,)` with the ids from place `start` on."""
        for begin, low, high in self._pieces(start, len(tokens)):
            self.tokens.read_into(low, tokens[begin - start : begin - start + high - low])

    def ignore_masked(self, targets: np.ndarray, start: int, ignored: int) -> None:
        """Set the `targets` `(n,)` from place `start` on that a mask leaves out to `ignored`."""
        if self.tokens.has_mask:
            for begin, low, high in self._pieces(start, len(targets)):
                part = targets[begin - start : begin - start + high - low]
                self.tokens.ignore_masked(part, low, ignored)

    def document_ends(self, start: int, count: int) -> np.ndarray:
        """Return the document ends within `[start, start + count)`, as `TokenArray` does."""
        ends = [begin - start for begin, _, _ in self._pieces(start, count)]
        return np.array(ends[1:], dtype=np.int64)

    def _pieces(self, start: int, count: int) -> list[Piece]:
        """Return the documents that overlap `[start, start + count)`.

        A window asks twice, for its ids and for its document ends: the last answer is kept.
        """
        span, pieces = self._last
        if span != (start, count):
            pieces = list(self._find(start, start + count))
            self._last = (start, count), pieces
        return pieces

    def _find(self, start: int, stop: int) -> Iterator[Piece]:
        fence = int(np.searchsorted(self._fences, start, side="right")) - 1
        position = int(self._fences[fence])
        while position < stop:
            first = fence * DOCUMENTS_PER_FENCE
            places = np.arange(first, min(first + DOCUMENTS_PER_FENCE, self.table.count))
            for number in permute(
                places, size=self.table.count, keys=self._keys, inverse=True
            ).tolist():
                low, high = self.table.bounds(number)
                begin, end = max(start, position), min(stop, position + high - low)
                if begin < end:
                    yield begin, low + begin - position, low + end - position
                position += high - low
                if position >= stop:
                    return
            fence += 1


class _DocumentTable:
    """The documents of a token array by their number."""

    def __init__(self, tokens: TokenArray) -> None:
        self.tokens = tokens
        self._ends_before = [0, *accumulate(file.ends.count for file in tokens.files)]
        self._tokens_before = [0, *accumulate(file.num_tokens for file in tokens.files)]
        self._known = self._ends_before[-1]
        is_open = len(tokens) > self._end(self._known - 1)  # tokens follow the last end
        self.count = self._known + is_open

    def bounds(self, number: int) -> tuple[int, int]:
        """Return the first token of a document, and the one after its last."""
        file = bisect_right(self._ends_before, number) - 1
        index = number - self._ends_before[file]
        if number == self._known or index == 0:
            return self._end(number - 1), self._end(number)
        first, last = self.tokens.files[file].ends.at(index - 1, 2)
        return self._tokens_before[file] + first, self._tokens_before[file] + last

    def _end(self, number: int) -> int:
        if number < 0:
            return 0
        if number == self._known:
            return len(self.tokens)
        file = bisect_right(self._ends_before, number) - 1
        (end,) = self.tokens.files[file].ends.at(number - self._ends_before[file], 1)
        return self._tokens_before[file] + end

    def iterate_lengths(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the number of a document, and the lengths of it and of those that follow it."""
        number = end = 0
        for ends in self.tokens.iterate_ends():
            for part in np.split(ends, range(COUNTED_AT_ONCE, len(ends), COUNTED_AT_ONCE)):
                yield number, np.diff(part, prepend=end)
                number, end = number + len(part), int(part[-1]) if len(part) else end
        if number < self.count:
            yield number, np.array([len(self.tokens) - end])
