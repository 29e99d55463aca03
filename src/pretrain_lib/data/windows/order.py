"""The order of the data: window k of the run as a pure function of (token counts, seed, k).

There is no state, and nothing depends on ranks, workers or the progress of the run, so a run
resumes at any window, on any number of processes, from one integer.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pretrain_lib.data.permutation import derive_keys, permute
from pretrain_lib.data.windows.sources import too_rare, too_short

BLOCK_WINDOWS = 4096  # every block of this many windows has exactly the mixture's proportions
CHUNK_WINDOWS = 512  # located at a time: a few windows cost as much as hundreds


def block_quotas(
    weights: tuple[float, ...], names: tuple[str, ...] | None = None
) -> tuple[int, ...]:
    """Apportion `BLOCK_WINDOWS` windows to `weights` by the largest-remainder method.

    `names` says that the weights are the token counts of sources, by their names.
    """
    if not weights or not 0 < sum(weights) < math.inf or min(weights) < 0:
        raise ValueError(f"data.weights={list(weights)} must be non-negative with a positive sum")
    shares = [weight / sum(weights) * BLOCK_WINDOWS for weight in weights]
    quotas = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (quotas[i] - shares[i], i))
    for i in by_remainder[: BLOCK_WINDOWS - sum(quotas)]:
        quotas[i] += 1
    for i, quota in enumerate(quotas):
        if weights[i] > 0 and quota == 0:
            raise too_rare(weights, i, BLOCK_WINDOWS, names and names[i])
    return tuple(quotas)


@dataclass(frozen=True)
class WindowOrder:
    """The endless shuffled order of windows over one or several token sources.

    A window is `sequence_length + 1` tokens: inputs, and targets shifted by one. Adjacent windows
    overlap by one token, so no target is lost. In epoch e, windows start at
    `offset(source, e) + i * sequence_length`, so boundaries move every epoch; each is drawn once.
    With `planned_windows` a window is an entry of a best-fit plan, the same in every epoch.
    """

    num_tokens: tuple[int, ...]  # per source
    sequence_length: int
    seed: int
    weights: tuple[float, ...] | None = None  # mixture weights; default: proportional to num_tokens
    planned_windows: tuple[int, ...] | None = None  # per source, with best-fit packing
    names: tuple[str, ...] | None = None  # per source, for errors

    def __post_init__(self) -> None:
        names = self.names or ("",) * len(self.num_tokens)
        for tokens, name in zip(self.num_tokens, names, strict=True):
            if tokens <= self.sequence_length and self.planned_windows is None:
                raise too_short(tokens, self.sequence_length, name)
        if self.weights is not None and len(self.weights) != len(self.num_tokens):
            raise ValueError(
                f"data.weights={list(self.weights)} needs one weight for each of the "
                f"{len(self.num_tokens)} sources"
            )
        block_quotas(self.weights or self.num_tokens, None if self.weights else names)

    def windows_per_epoch(self, source: int) -> int:
        """Return the number of windows in an epoch of `source`, the same for every epoch."""
        if self.planned_windows is not None:
            return self.planned_windows[source]
        tokens, length = self.num_tokens[source], self.sequence_length
        return max(1, (tokens - length) // length)

    def offset(self, source: int, epoch: int) -> int:
        """Return the first token of the first window of `source` in `epoch`."""
        spare = self.num_tokens[source] - self.windows_per_epoch(source) * self.sequence_length
        keys = derive_keys("offset", self.seed, source, epoch)
        return int(keys[0] % np.uint64(min(self.sequence_length, spare)))

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return `(source, epoch, start)`, int64 each, of the windows at `positions` in the run.

        `start` is the index in the source of the window's first token, or its index in the plan.
        """
        chunk, slot = np.divmod(np.asarray(positions, dtype=np.int64), CHUNK_WINDOWS)
        located = np.empty((3, len(slot)), dtype=np.int64)
        for number in np.unique(chunk).tolist():
            here = chunk == number
            located[:, here] = _located_chunk(self, number)[:, slot[here]]
        return tuple(located)

    def planned_epochs(self, num_windows: int) -> list[float]:
        """Return the epochs over each source in the first `num_windows` windows of the run."""
        quotas = np.array(block_quotas(self.weights or self.num_tokens))
        block, slot = divmod(num_windows, BLOCK_WINDOWS)
        sources, _ = _mixture_block(tuple(quotas.tolist()), self.seed, block)
        drawn = block * quotas + np.bincount(sources[:slot], minlength=len(quotas))
        return [int(n) / self.windows_per_epoch(s) for s, n in enumerate(drawn)]


@lru_cache(maxsize=64)
def _located_chunk(order: WindowOrder, number: int) -> np.ndarray:
    """Return `(source, epoch, start)` of each window of a chunk: int64, `(3, CHUNK_WINDOWS)`."""
    quotas = block_quotas(order.weights or order.num_tokens)
    block, slot = divmod(number * CHUNK_WINDOWS, BLOCK_WINDOWS)
    here = slice(slot, slot + CHUNK_WINDOWS)
    source, before = (array[here] for array in _mixture_block(quotas, order.seed, block))
    drawn = block * np.array(quotas)[source] + before  # windows drawn from the source before
    size = np.array([order.windows_per_epoch(s) for s in range(len(quotas))])[source]
    epoch, start = drawn // size, np.empty_like(drawn)
    for s, e in sorted(set(zip(source.tolist(), epoch.tolist(), strict=True))):
        here = (source == s) & (epoch == e)
        keys = derive_keys("window", order.seed, s, e)
        windows = permute(drawn[here] % size[here], size=order.windows_per_epoch(s), keys=keys)
        planned = order.planned_windows is not None
        start[here] = windows if planned else order.offset(s, e) + windows * order.sequence_length
    return np.stack([source, epoch, start])


@lru_cache(maxsize=64)
def _mixture_block(quotas: tuple[int, ...], seed: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the source of each slot of a block, and how many earlier slots have that source."""
    keys = derive_keys("mixture", seed, block)
    shuffled = permute(np.arange(BLOCK_WINDOWS), size=BLOCK_WINDOWS, keys=keys)
    sources = np.repeat(np.arange(len(quotas)), quotas)[shuffled]
    before = np.empty(BLOCK_WINDOWS, dtype=np.int64)
    for source, quota in enumerate(quotas):
        before[sources == source] = np.arange(quota)
    return sources, before
