"""Other packages' progress bars and warnings, kept off what is no terminal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO


@contextmanager
def without_foreign_progress() -> Iterator[None]:
    """Keep the progress bars and warnings of other packages off a console that is no terminal."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if sys.stderr.isatty():
        yield
    else:
        with redirect_stderr(StringIO()):  # lm-eval's bars have no switch; errors are raised
            yield
