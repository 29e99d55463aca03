"""A python for tests that starts at once: a fork of a process that has imported the library.

`server.py` imports all that the library may import, and forks itself for each command. `python`
stands in for the interpreter: it asks the server for a process with its own arguments, directory,
environment and standard streams, hands on the signals that end programs, and ends as that process
does. `bin/accelerate` stands in for the launcher likewise. With `FORKS_CHILDREN`, what a fork
starts by `sys.executable`, as the launcher of a single process does, is a fork as well.

What a test says about a fresh interpreter (what is imported, what is read at import, memory,
limits, a kill of the process itself) it says with `sys.executable`.
"""

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FOLDER = Path(__file__).parent
READY_SECONDS = 180


@functools.cache
def forked_python() -> str:
    """Return what to call instead of `sys.executable`, once the server of this session is ready."""
    if "FORKS_ADDRESS" not in os.environ:
        start_server()
    address, deadline = Path(os.environ["FORKS_ADDRESS"]), time.monotonic() + READY_SECONDS
    while not address.exists():
        if time.monotonic() > deadline:
            raise RuntimeError("the fork server did not start: see its error above")
        time.sleep(0.05)
    return str(FOLDER / "python")


def start_server() -> None:
    """Start the server, without waiting; processes started from here on share it."""
    folder = tempfile.mkdtemp(prefix="forks-")
    address = f"{folder}/socket"
    command = [sys.executable, FOLDER / "server.py", address]
    server = subprocess.Popen(command, stdin=subprocess.PIPE)
    atexit.register(_stop, server, folder)
    os.environ |= {
        "FORKS_PYTHON": sys.executable,
        "FORKS_ACCELERATE": str(Path(sys.executable).with_name("accelerate")),
        "FORKS_ADDRESS": address,
    }


def _stop(server: subprocess.Popen, folder: str) -> None:
    """Let the server end, which kills what it has forked."""
    server.stdin.close()
    server.wait()
    shutil.rmtree(folder)
