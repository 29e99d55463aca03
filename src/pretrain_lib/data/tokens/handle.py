"""A file handle for positioned reads from several threads."""

import os
import weakref
from collections import deque
from io import FileIO
from pathlib import Path
from typing import ClassVar

MAX_OPEN = 512


class Handle:
    """A file for positioned reads from several threads, kept open while few others are.

    Opening a file costs as much as reading a window. Only the `MAX_OPEN` most recently opened files
    stay open; an older one is closed once no thread is reading from it.
    """

    _opened: ClassVar[deque[weakref.ref["Handle"]]] = deque()

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: FileIO | None = None

    def __getstate__(self) -> dict:
        return {"path": self.path, "_file": None}  # another process opens its own

    def read(self, start: int, count: int) -> bytes:
        """Return bytes `[start, start + count)`, fewer at the end of the file."""
        file = self._file or self._open()
        try:
            return os.pread(file.fileno(), count, start)
        except OSError as error:
            error.filename = str(self.path)  # which only a failing `open` says
            raise

    def _open(self) -> FileIO:
        self._file = file = FileIO(self.path)
        self._opened.append(weakref.ref(self))
        if len(self._opened) > MAX_OPEN and (oldest := self._opened.popleft()()) is not None:
            oldest._file = None
        return file
