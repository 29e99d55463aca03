"""A user's mistakes in one line, and the exit codes of every command."""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from pretrain_lib.ranks import is_local_main_rank

DONE, BAD_INPUT, RESUMABLE, INTERRUPTED = 0, 2, 75, 130
OWN_CODE = Path(__file__).parent


class LocalFault(ValueError):
    """What one process alone may have met, such as a damaged file: it says so, whichever it is."""


def report_errors(
    action: Callable[[], int | None], *, user_errors: tuple[type[Exception], ...] = (ValueError,)
) -> int:
    """Call `action` and return its exit code; a user's mistake is printed in one line, with 2.

    A ValueError raised by other code than this library's is a defect and keeps its traceback.
    """
    try:
        return action() or DONE
    except user_errors as error:
        defect = isinstance(error, ValueError) and not raised_here(error)
        if defect or isinstance(error, BrokenPipeError):
            raise
        if is_local_main_rank():  # the others of a machine would say the same
            print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


def raised_here(error: ValueError) -> bool:
    """Return whether it was this library that raised an error, not a package it uses."""
    origin = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return OWN_CODE in origin.parents
