"""Training windows from a stream of text, read from the segments of a spool.

A segment holds S windows. Window k of the run lies in segment k // S and is shuffled within that
segment. It is a pure function of (source, seed, k, S), so a run resumes at any k, on any number of
processes. A segment that was deleted is produced again.
"""

import atexit
import contextlib
import itertools
import os
import time
import weakref
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import NoReturn

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from pretrain_lib.data.permutation import derive_keys, permute
from pretrain_lib.data.pool import CONTEXT, count_cores, safe_imports, warm_up
from pretrain_lib.data.prepare.spool import (
    END_SIGNAL,
    POLL_SECONDS,
    SEGMENTS_BEHIND,
    Spool,
    produce,
)
from pretrain_lib.data.prepare.stream_errors import raise_error
from pretrain_lib.data.tokens.arrays import TokenArray, TokenFile
from pretrain_lib.data.tokens.shards import read_manifest
from pretrain_lib.data.windows.batches import LARGEST_SEED, Batch, check_positions
from pretrain_lib.data.windows.packing import Windows, fill_window
from pretrain_lib.values import check_value, show

KEPT_OPEN = 3  # segments
WINDOWS_AT_ONCE = 64  # read at a time by `__iter__`


class StreamingDataset(IterableDataset):
    """The shuffled windows of a stream, from `first_window` on.

    Iterating yields the same dicts as `PackedDataset`, endlessly, and `state_dict` holds the number
    of windows yielded so far. Loaders that prefetch (those of Accelerate and of the transformers
    Trainer) consume more windows than they return: with them, count the windows trained on. With
    `produces` this process starts the producer that fills the spool, of which there is one per
    machine; the other processes wait for its segments.

    Raises ValueError for a source that cannot be read or has changed, and RuntimeError if the
    producer fails.
    """

    _producer: BaseProcess | None = None

    def __init__(
        self,
        spool: Spool,
        *,
        sequence_length: int,
        seed: int = 0,
        document_masking: bool = False,
        first_window: int = 0,
        cursor: dict | None = None,
        produces: bool = True,
        workers: int | None = None,
    ) -> None:
        if not isinstance(spool, Spool):
            raise ValueError(f"spool={show(spool)} must be what pretrain_lib.open_spool returns")
        sequence_length = check_value(sequence_length, "sequence_length", int, minimum=1)
        seed = check_value(seed, "seed", int, minimum=0, maximum=LARGEST_SEED)
        check_value(document_masking, "document_masking", bool)
        first_window = check_value(first_window, "first_window", int, minimum=0, maximum=2**62)
        workers = check_value(workers, "workers", int | None, minimum=1)
        if spool.segment_tokens % sequence_length:
            raise ValueError(
                f"sequence_length={sequence_length} does not divide segment_tokens="
                f"{spool.segment_tokens} of {spool.folder}: open a spool with segment_tokens="
                f"{-(-spool.segment_tokens // sequence_length) * sequence_length} elsewhere"
            )
        self.spool, self.sequence_length = spool, sequence_length
        self.seed, self.document_masking = seed, document_masking
        self.windows_per_segment = spool.segment_tokens // sequence_length
        self.dtype = np.dtype(read_manifest(spool.folder)["dtype"])
        self.produces, self.workers = produces, workers or count_cores()
        with safe_imports():
            self._position = CONTEXT.Value("q", 0)  # the segment being read, for the producer
        self.load_state_dict({"windows": first_window, "cursor": cursor})
        atexit.register(_close, weakref.ref(self))

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a StreamingDataset has a process of its own and cannot be copied or pickled: make "
            "another of the same spool, with first_window=WINDOWS or load_state_dict"
        )

    def __iter__(self) -> Iterator[Batch]:
        if get_worker_info() is not None:
            raise ValueError(
                "a StreamingDataset prefetches in processes of its own: give the DataLoader "
                "num_workers=0"
            )
        for first in itertools.count(self._windows, WINDOWS_AT_ONCE):
            batch = self.batch(range(first, first + WINDOWS_AT_ONCE))
            for row in range(WINDOWS_AT_ONCE):
                self._windows = first + row + 1
                yield {name: rows[row] for name, rows in batch.items()}

    def state_dict(self) -> dict:
        """Return the number of windows yielded, and the cursor of the next one in the source."""
        return {"windows": self._windows, "cursor": self.cursor(self._windows)}

    def load_state_dict(self, state: dict) -> None:
        """Continue after the windows counted in `state`, on any number of processes."""
        self.close()
        self._windows, self._hint = state["windows"], state.get("cursor")
        self._position.value = state["windows"] // self.windows_per_segment

    def cursor(self, windows: int) -> dict | None:
        """Return where in the source the segment of window `windows` begins, or None if unknown."""
        segment = windows // self.windows_per_segment
        begins = self.spool.read_cursor(segment)
        return None if begins is None else {"segment": segment, "begins": vars(begins)}

    def batch(self, positions: Sequence[int]) -> Batch:
        """Return the windows at `positions`, stacked: `(B, T)` per tensor."""
        numbers = check_positions(positions)
        windows = Windows.empty(
            len(positions), self.sequence_length, document_masking=self.document_masking
        )
        segments, slots = np.divmod(numbers, self.windows_per_segment)
        for segment in np.unique(segments).tolist():
            tokens = self._read_segment(segment)
            rows = np.flatnonzero(segments == segment)
            keys = derive_keys("segment", self.seed, segment)
            starts = permute(slots[rows], size=self.windows_per_segment, keys=keys)
            for row, start in zip(rows.tolist(), starts.tolist(), strict=True):
                fill_window(windows, row, tokens, start * self.sequence_length)
        return {name: torch.from_numpy(array) for name, array in windows.as_dict().items()}

    def _read_segment(self, segment: int) -> TokenArray:
        """Return the tokens of a segment, waiting until it is on disk."""
        behind = self._position.value - segment
        if behind > SEGMENTS_BEHIND or (behind > 0 and not self.spool.has_segment(segment)):
            self.close()  # the segment was deleted: restart the producer there
            self._position.value = segment
        self._position.value = max(self._position.value, segment)
        self._start_producer()
        if segment not in self._open:
            while not self.spool.has_segment(segment):
                self._check_producer()
                time.sleep(POLL_SECONDS)
            path = self.spool.folder / f"{self.spool.segment_name(segment)}.bin"
            num_tokens = self.spool.segment_tokens + 1
            self._open[segment] = TokenArray(
                [TokenFile(path, num_tokens, self.dtype, is_shard=True)]
            )
            for oldest in list(self._open)[:-KEPT_OPEN]:
                del self._open[oldest]
        return self._open[segment]

    def _start_producer(self) -> None:
        if self._producer is None and self.produces:
            first = self._position.value
            arguments = (self.spool, first, self._hint, self._position, self.workers)
            warm_up(produce)  # imported once for all processes
            producer = CONTEXT.Process(target=produce, args=arguments)
            producer.start()
            self._producer = producer

    def _check_producer(self) -> None:
        producer = self._producer
        ended = producer is not None and not producer.is_alive()
        raise_error(
            self.spool.folder,
            process=producer and producer.pid,
            exit_code=producer.exitcode if ended else None,
        )
        if ended:  # raised last: an error file says why
            raise RuntimeError(
                f"the process that fills {self.spool.folder} ended unexpectedly. If it ran out of "
                f"memory, start again with fewer data.workers; a script of your own needs the "
                f"guard `if __name__ == '__main__':`"
            )

    def close(self) -> None:
        """Stop the producer; the segments on disk are kept."""
        if self._producer is not None:
            if self._producer.is_alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._producer.pid, END_SIGNAL)
            self._producer.join()
            self._producer = None
        # The files of open segments may be deleted before they are read again.
        self._open: dict[int, TokenArray] = {}

    __del__ = close  # otherwise a discarded dataset would keep the folder locked


def _close(dataset: weakref.ref) -> None:
    if (alive := dataset()) is not None:
        alive.close()
