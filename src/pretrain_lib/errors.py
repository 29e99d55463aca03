"""Report user errors in one line, and define the exit codes of all commands."""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from pretrain_lib.ranks import is_local_main_rank

DONE, BAD_INPUT, RESUMABLE, INTERRUPTED = 0, 2, 75, 130
# The environment variable of a file into which a recipe writes its exit code: `accelerate launch`
# turns all but 0 into 1.
EXIT_CODE_FILE = "PRETRAIN_EXIT_CODE_FILE"
OWN_CODE = Path(__file__).parent


class LocalFault(ValueError):
    """An error that may occur on a single process, such as a damaged file; any rank prints it."""


def report_errors(
    action: Callable[[], int | None], *, user_errors: tuple[type[Exception], ...] = (ValueError,)
) -> int:
    """Call `action` and return its exit code; on a user error, print it in one line and return 2.

    A ValueError raised outside this library is a bug, not a user error, and propagates.
    """
    try:
        return action() or DONE
    except user_errors as error:
        defect = isinstance(error, ValueError) and not raised_here(error)
        if defect or isinstance(error, BrokenPipeError):
            raise
        if is_local_main_rank():  # the other processes of the machine have the same error
            print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


def raised_here(error: ValueError) -> bool:
    """Return whether an error was raised by this library, not by one of its dependencies."""
    origin = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return OWN_CODE in origin.parents
