"""Ask the fork server for a process in place of this one, and end as it ends.

Run by `python` of this folder, without the packages of the environment: it takes milliseconds.
"""

import json
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def main():
    """Run the command of this process in a fork of the server."""
    command = {"arguments": sys.argv[1:], "cwd": str(Path.cwd()), "environment": dict(os.environ)}
    content = json.dumps(command).encode()
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ["FORKS_ADDRESS"])
        socket.send_fds(server, [len(content).to_bytes(4)], [0, 1, 2])
        server.sendall(content)
        answers = server.makefile()
        first = answers.readline()
        if not first.startswith("pid "):
            sys.exit(first or "the fork server is gone")
        forward_signals(int(first.split()[1]))
        status = int(answers.readline())
    if status >= 0:
        os._exit(status)
    with suppress(OSError):  # SIGKILL cannot be handled
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)


def forward_signals(pid):
    """Hand on to a process what this one is sent."""

    def forward(number, _):
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    for number in FORWARDED:
        signal.signal(number, forward)


if __name__ == "__main__":
    main()
