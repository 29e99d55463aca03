"""Report user errors in one line; exit codes of all commands, and signals that stop a run."""

import errno
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from pretrain_lib.ranks import is_local_main_rank

DONE, FAILED, BAD_INPUT, DIVERGED, RESUMABLE, INTERRUPTED = 0, 1, 2, 3, 75, 130
# The environment variable of a file into which a recipe writes its exit code: `accelerate launch`
# turns all but 0 into 1.
EXIT_CODE_FILE = "PRETRAIN_EXIT_CODE_FILE"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)  # that stop a run
ISSUES = "https://github.com/pretrain-lib/pretrain_lib/issues"
OWN_CODE = Path(__file__).parent

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DISK_ERRORS = (*DISK_FULL, errno.EIO, errno.EACCES, errno.EPERM, errno.EROFS, errno.ESTALE)


class LocalFault(ValueError):
    """An error that has ended a training, perhaps on one process only, such as a damaged file."""


def heard_signals() -> list[int]:
    """Return the signals that stop a run; under `nohup`, that its terminal is closed does not."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in SIGNALS if not (ignored and number == signal.SIGHUP)]


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error says that there is no room on the disk."""
    return isinstance(error, OSError) and error.errno in DISK_FULL


def is_of_disk(error: BaseException) -> bool:
    """Return whether an error says that a file cannot be read or written."""
    return isinstance(error, OSError) and error.errno in DISK_ERRORS


def report_errors(
    action: Callable[[], int | None], *, user_errors: tuple[type[Exception], ...] = (ValueError,)
) -> int:
    """Call `action` and return its exit code; on a user error, print it in one line and return 2.

    Any other exception, such as a ValueError raised outside this library, is a bug: its traceback
    is printed and logged, the last line says what to report, and the exit code is 1.
    """
    try:
        return action() or DONE
    except BrokenPipeError:
        raise
    except Exception as error:
        defect = isinstance(error, ValueError) and not raised_here(error)
        if defect or not isinstance(error, user_errors):
            descriptor, log = tempfile.mkstemp(prefix="pretrain-error-", suffix=".log")
            os.close(descriptor)
            tell_bug(error, Path(log))
            return FAILED
        if is_local_main_rank():  # the other processes of the machine have the same error
            print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


def tell_bug(error: Exception, log: Path) -> None:
    """Print the traceback of a bug and write it to `log`; the last line says what to report."""
    text = "".join(traceback.format_exception(error))
    print(text, end="", file=sys.stderr)
    try:
        log.write_text(text, encoding="utf-8")
    except OSError as problem:  # the traceback stands above
        print(f"error: {log} could not be written: {problem}", file=sys.stderr)
    print(
        f"error: {type(error).__name__}, which is unexpected: the traceback is in {log}; unless it "
        f"comes from code of your own, please report it with that file at {ISSUES}",
        file=sys.stderr,
    )


def raised_here(error: ValueError) -> bool:
    """Return whether an error was raised by this library, not by one of its dependencies."""
    origin = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return OWN_CODE in origin.parents
