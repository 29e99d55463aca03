"""Where the documents of a token file end."""

import hashlib
from bisect import bisect_right
from io import BytesIO

import numpy as np

from pretrain_lib.data.tokens.places import Place, open_handle

ENDS_PER_FENCE = 256


class EndsTable:
    """The document ends of a file, read from disk; memory holds one in `ENDS_PER_FENCE`."""

    def __init__(self, path: Place, *, sha256: str | None = None) -> None:
        """Open a `.npy` or raw uint64 file; raises ValueError if `sha256` does not
        match, or if the ends do not ascend."""
        raw = path.read_bytes()
        if sha256 is not None and hashlib.sha256(raw).hexdigest() != sha256:
            raise ValueError(
                f"{path}: the data differ from what was written; prepare the folder again"
            )
        if path.suffix == ".npy":
            ends = np.load(BytesIO(raw), allow_pickle=False)
        else:
            ends = np.frombuffer(raw, dtype="<u8")
        if np.any(ends[1:] < ends[:-1]):
            place = int(np.argmax(ends[1:] < ends[:-1]))
            raise ValueError(
                f"{path}: document {place + 1} ends at token {ends[place + 1]}, before document "
                f"{place}, at {ends[place]}; write the file and its index again"
            )
        self.count, self._handle = len(ends), open_handle(path)
        self._header_bytes = len(raw) - ends.nbytes
        self._fences: list[int] = ends[::ENDS_PER_FENCE].tolist()

    def at(self, index: int, count: int) -> list[int]:
        """Return `count` document ends from an index in the file on."""
        assert 0 <= index <= self.count - count, f"{index} is outside the table"
        raw = self._handle.read(self._header_bytes + 8 * index, 8 * count)
        return np.frombuffer(raw, dtype="<i8").tolist()

    def between(self, low: int, high: int) -> np.ndarray:
        """Return the ends in `(low, high]`, int64, ascending."""
        first = max(0, bisect_right(self._fences, low) - 1) * ENDS_PER_FENCE
        last = min(bisect_right(self._fences, high) * ENDS_PER_FENCE, self.count)
        raw = self._handle.read(self._header_bytes + 8 * first, 8 * (last - first))
        ends = np.frombuffer(raw, dtype="<i8")
        return ends[slice(*ends.searchsorted((low + 1, high + 1)).tolist())]


class EndsInMemory:
    """The document ends of a file whose index does not list them as they are needed here."""

    def __init__(self, ends: np.ndarray) -> None:
        """Keep `ends`: int64, ascending."""
        self.count, self._ends = len(ends), ends

    def at(self, index: int, count: int) -> list[int]:
        """Return `count` document ends from an index on."""
        return self._ends[index : index + count].tolist()

    def between(self, low: int, high: int) -> np.ndarray:
        """Return the ends in `(low, high]`, int64, ascending."""
        return self._ends[slice(*self._ends.searchsorted((low + 1, high + 1)).tolist())]
