"""The console of a program: what it cannot show is escaped, and a run outlives it."""

import errno
import os
import sys
from io import TextIOWrapper
from typing import Any

GONE = (errno.EPIPE, errno.EIO)  # of a pipe without a reader, of a terminal that was closed


class LastingStream:
    """A stream that drops what it cannot write, instead of failing: nobody reads it any more.

    A log on a full disk is written again when there is room.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text; return its length."""
        try:
            self._stream.write(text)
        except OSError as error:
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        """Flush what was written."""
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        if error.errno in GONE:  # for ever: let it lead nowhere, also for what is buffered
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def open_console(*, lasting: bool = False) -> None:
    """Make the console safe to write to; to be called by a program, not by a library.

    What its encoding lacks is escaped. Streams that were closed lead nowhere, or the next file that
    is opened would get what is written to them. A `lasting` console never fails, whatever becomes
    of the terminal or of the reader of a pipe.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # the lowest one that is free is this one
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
        stream = getattr(sys, name)
        if isinstance(stream, TextIOWrapper):  # a notebook's shows everything
            stream.reconfigure(errors="backslashreplace")
            if lasting:
                setattr(sys, name, LastingStream(stream))
