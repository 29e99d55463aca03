"""The state of a run, in `status.json`; it is written even on a full disk."""

import os
from pathlib import Path

from pretrain_lib.distributed.launched import launch_id
from pretrain_lib.errors import is_disk_full
from pretrain_lib.files.reading import read_if_whole
from pretrain_lib.files.writes import json_bytes, write_json

STATUS = "status.json"
STATES = ("running", "done", "resumable", "failed", "refused")


def write_status(
    folder: Path, state: str, *, step: int | None = None, reason: str = "", is_over: bool = False
) -> None:
    """Write `status.json`; `state` is running, done, resumable, failed or refused.

    `is_over` says that no launcher restarts the processes, as none does after the states done and
    refused. One that has lost a process stops the others by a signal, and restarts them.
    """
    assert state in STATES, state
    status = {"state": state, "step": step, "reason": reason}
    launch = launch_id(is_over=is_over or state in ("done", "refused"))
    status |= {} if launch is None else {"launch": launch}
    try:
        write_json(folder / STATUS, status)
    except OSError as error:
        if not is_disk_full(error) or not (folder / STATUS).is_file():
            raise
        _write_in_place(folder / STATUS, status)


def _write_in_place(path: Path, status: dict) -> None:
    """Overwrite the status, which takes no room, as far as the file has blocks on the disk.

    A crash at this instant would leave a damaged status, on which no start depends.
    """
    with path.open("r+b") as file:
        file.write(json_bytes(status))
        file.truncate()
        file.flush()
        os.fsync(file.fileno())


def read_status(folder: Path) -> dict:
    """Return the content of `status.json`, empty if there is none.

    A damaged one counts as missing, with a warning: no start depends on it.
    """
    return read_if_whole(folder / STATUS)
