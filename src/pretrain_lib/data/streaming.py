"""Windows of a stream: the same order and reader, over the segments of a spool. Floor 6.

Window k of a run lies in segment k // S of the stream, S windows each, and is shuffled with the
others of that segment: a pure function of (source, seed, k, S), so a run resumes at any k, on any
number of processes. A segment that was deleted is made again.
"""

import atexit
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from pretrain_lib.data.arrays import TokenArray, TokenFile
from pretrain_lib.data.batches import Batch
from pretrain_lib.data.order import derive_keys, permute
from pretrain_lib.data.packing import Windows, fill_window
from pretrain_lib.data.pool import CONTEXT, count_cores
from pretrain_lib.data.shards import read_manifest
from pretrain_lib.data.spool import END_SIGNAL, ERROR, POLL_SECONDS, Spool, produce

KEPT_OPEN = 3  # segments
WINDOWS_AT_ONCE = 64  # read when iterated


class StreamingDataset(IterableDataset):
    """The shuffled windows of a stream, from `first_window` on.

    Iterated, it yields dicts as `PackedDataset` does, for ever; `state_dict` says how many windows
    were taken out. Loaders that read ahead (Accelerate's, that of transformers' Trainer) take out
    more than they hand on: with them, count the windows that were trained on. With `produces` this
    process starts the one that fills the spool; the others of a machine wait for it.
    """

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
        assert spool.segment_tokens % sequence_length == 0, "a segment is whole windows"
        self.spool, self.sequence_length = spool, sequence_length
        self.seed, self.document_masking = seed, document_masking
        self.windows_per_segment = spool.segment_tokens // sequence_length
        self.dtype = np.dtype(read_manifest(spool.folder)["dtype"])
        self.produces, self.workers = produces, workers or count_cores()
        self._open: dict[int, TokenArray] = {}
        self._producer = None
        self._position = CONTEXT.Value("q", 0)  # the segment being read
        self.load_state_dict({"windows": first_window, "cursor": cursor})
        atexit.register(self.close)

    def __iter__(self) -> Iterator[Batch]:
        if get_worker_info() is not None:
            raise ValueError(
                "a stream is read ahead by processes of its own: give the DataLoader num_workers=0"
            )
        for first in itertools.count(self._windows, WINDOWS_AT_ONCE):
            batch = self.batch(range(first, first + WINDOWS_AT_ONCE))
            for row in range(WINDOWS_AT_ONCE):
                self._windows = first + row + 1
                yield {name: rows[row] for name, rows in batch.items()}

    def state_dict(self) -> dict:
        """Return the number of windows taken out, and where in the source the next one lies."""
        return {"windows": self._windows, "cursor": self.cursor(self._windows)}

    def load_state_dict(self, state: dict) -> None:
        """Continue behind the windows that a state counts, on any number of processes."""
        self.close()
        self._windows, self._hint = state["windows"], state.get("cursor")
        self._position.value = state["windows"] // self.windows_per_segment

    def cursor(self, windows: int) -> dict | None:
        """Return where in the source the segment of a window begins, if this process knows it."""
        cursor = self.spool.read_cursor(windows // self.windows_per_segment)
        return None if cursor is None else vars(cursor)

    def batch(self, positions: Sequence[int]) -> Batch:
        """Return the windows at `positions`, stacked: `(B, T)` per tensor."""
        self._start_producer()
        windows = Windows.empty(
            len(positions), self.sequence_length, document_masking=self.document_masking
        )
        segments, slots = np.divmod(np.array(positions, dtype=np.int64), self.windows_per_segment)
        for segment in np.unique(segments).tolist():
            tokens = self._read_segment(segment)
            rows = np.flatnonzero(segments == segment)
            keys = derive_keys("segment", self.seed, segment)
            starts = permute(slots[rows], size=self.windows_per_segment, keys=keys)
            for row, start in zip(rows.tolist(), starts.tolist(), strict=True):
                fill_window(windows, row, tokens, start * self.sequence_length)
        self._position.value = max(self._position.value, int(segments.min()))
        return {name: torch.from_numpy(array) for name, array in windows.as_dict().items()}

    def _read_segment(self, segment: int) -> TokenArray:
        """Return a segment, waiting until it is there."""
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
            self._producer = CONTEXT.Process(target=produce, args=arguments)
            self._producer.start()

    def _check_producer(self) -> None:
        path = self.spool.folder / ERROR
        if path.is_file():
            error = json.loads(path.read_text())
            if error["kind"] == "ValueError":
                raise ValueError(error["message"])
            raise RuntimeError(f"the stream's producer failed: {error['message']}")
        if self._producer is not None and not self._producer.is_alive():
            raise RuntimeError(
                f"the process that fills {self.spool.folder} was killed, perhaps for want of "
                f"memory: start again with fewer data.workers"
            )

    def close(self) -> None:
        """End the producer; what it wrote stays."""
        if self._producer is not None:
            if self._producer.is_alive():
                os.kill(self._producer.pid, END_SIGNAL)
            self._producer.join()
            self._producer = None
