"""Suppress progress bars and warnings of other packages."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO


@contextmanager
def without_foreign_progress() -> Iterator[None]:
    """Suppress warnings of transformers, and all output to stderr if that is not a terminal."""
    from transformers.utils.logging import set_verbosity_error

    set_verbosity_error()
    if sys.stderr.isatty():
        yield
    else:
        # The progress bars of lm-eval cannot be turned off. Errors are raised, so none is lost.
        with redirect_stderr(StringIO()):
            yield


@contextmanager
def without_warnings_of(module: str) -> Iterator[None]:
    """Suppress the warnings that a module logs, such as one of transformers."""
    logger = logging.getLogger(module)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
