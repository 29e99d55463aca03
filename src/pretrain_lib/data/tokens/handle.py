"""A file that is read at any place, from any thread."""

import os
import weakref
from collections import deque
from io import FileIO
from pathlib import Path
from typing import ClassVar

MAX_OPEN = 512


class Handle:
    """A file to be read at any place, from any thread, and kept open while few others are.

    Opening costs as much as reading a window. A handle that falls out of the `MAX_OPEN` opened last
    lets go of its file, which closes when the last thread has read from it.
    """

    _opened: ClassVar[deque[weakref.ref["Handle"]]] = deque()

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: FileIO | None = None

    def __getstate__(self) -> dict:
        return {"path": self.path, "_file": None}  # another process opens its own

    def read(self, start: int, count: int) -> bytes:
        """Return bytes `[start, start + count)`, fewer at the file's end."""
        file = self._file or self._open()
        return os.pread(file.fileno(), count, start)

    def _open(self) -> FileIO:
        self._file = file = FileIO(self.path)
        self._opened.append(weakref.ref(self))
        if len(self._opened) > MAX_OPEN and (oldest := self._opened.popleft()()) is not None:
            oldest._file = None
        return file
