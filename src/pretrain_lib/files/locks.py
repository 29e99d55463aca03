"""Lock a folder against other processes: by flock, or by a file where there is no flock.

Some file systems have no flock: Lustre without `-o flock`, some NFS. There the lock is a file that
is created exclusively and says which process holds the folder. It is taken over only if that
process has provably ended, which can be told on its own machine alone.
"""

import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pretrain_lib.files.reading import read_object
from pretrain_lib.files.writes import make_folder

LOCK, HOLDER = ".lock", ".lock-holder"
ATTEMPTS, PAUSE_SECONDS = 5, 0.1  # a process that only tests a lock releases it at once
HEARTBEAT_SECONDS = 15
BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)  # what flock says of a lock that is held
NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def lock_folder(folder: Path, *, setting: str) -> Iterator[None]:
    """Create and lock a folder; raises ValueError, naming `setting`, if it cannot be locked.

    What this makes is removed in the end if it holds nothing but the lock.
    """
    was_locked_before = (folder / LOCK).exists()
    try:
        made = make_folder(folder)
        lock = (folder / LOCK).open("ab")  # a link to a file leaves that file as it is
    except OSError as error:
        raise ValueError(f"{setting}={folder} cannot be written: {error}") from error
    try:
        if not _flock(lock, folder, setting):
            with _hold_by_file(folder, setting):
                yield
            return
        if (holder := _holder(folder)) is not None and not _has_ended(holder):
            raise ValueError(_in_use(folder, setting, holder))
        yield
    finally:
        if not was_locked_before:
            _remove_if_empty(lock, folder, made)
        lock.close()


def is_locked(folder: Path) -> bool:
    """Return whether a process holds the lock of a folder."""
    if (holder := _holder(folder)) is not None and not _has_ended(holder):
        return True
    try:
        with (folder / LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in BUSY
    return False


def _remove_if_empty(lock: BinaryIO, folder: Path, made: list[Path]) -> None:
    """Remove the lock of a folder without other files, and the folders that were made for it."""
    with suppress(OSError):  # there are other files, or it is in use
        if [path.name for path in folder.iterdir()] == [LOCK] and _is_there(lock, folder):
            (folder / LOCK).unlink()
            for path in made:
                path.rmdir()


def _flock(lock: BinaryIO, folder: Path, setting: str) -> bool:
    """Lock by flock; return False if the file system has none."""
    for attempt in range(ATTEMPTS):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_FLOCK:
                return False
            if error.errno not in BUSY:
                raise ValueError(f"{setting}={folder} cannot be locked: {error}") from error
            if attempt == ATTEMPTS - 1:
                raise ValueError(_in_use(folder, setting, {})) from error
            time.sleep(PAUSE_SECONDS)
        else:
            if _is_there(lock, folder):
                return True
            break  # its last holder has removed the folder
    raise ValueError(_in_use(folder, setting, {}))


def _is_there(lock: BinaryIO, folder: Path) -> bool:
    """Return whether the open lock is still the one in the folder."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), (folder / LOCK).stat())
    except FileNotFoundError:
        return False


def _in_use(folder: Path, setting: str, holder: dict) -> str:
    who = "another process; wait for it, or give another folder"
    if holder:
        try:
            age = time.time() - (folder / HOLDER).stat().st_mtime
        except FileNotFoundError:  # released just now
            age = 0
        who = (
            f"process {holder.get('process')} on {holder.get('host')}, which gave its last sign of "
            f"life {age:.0f} s ago; wait for it, or give another folder. If that process has "
            f"ended, delete {folder / HOLDER}"
        )
    return f"{setting}={folder} is in use by {who}"


@contextmanager
def _hold_by_file(folder: Path, setting: str) -> Iterator[None]:
    """Lock a folder by a file that is created exclusively and touched while it is held."""
    claim = json.dumps({"token": secrets.token_hex(8), **_this_process()}) + "\n"
    path, ended = folder / HOLDER, threading.Event()
    for _ in range(ATTEMPTS):
        if _create(path, claim):
            break
        if (holder := _holder(folder)) is not None and _has_ended(holder):
            _remove_ended(path, holder)
        else:
            time.sleep(PAUSE_SECONDS)
    else:
        raise ValueError(_in_use(folder, setting, _holder(folder) or {}))

    def beat() -> None:
        while not ended.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):  # it only tells others how old the lock is
                os.utime(path)

    heart = threading.Thread(target=beat, daemon=True, name="lock")
    heart.start()
    try:
        yield
    finally:
        ended.set()
        heart.join()
        with suppress(FileNotFoundError):
            if path.read_text(encoding="utf-8") == claim:
                path.unlink()


def _create(path: Path, content: str) -> bool:
    """Create a file with its content, all at once; return False if it exists."""
    staging = path.with_name(f"{path.name}-{secrets.token_hex(8)}")
    staging.write_text(content, encoding="utf-8")
    try:
        os.link(staging, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(content)
        except FileExistsError:
            return False
    finally:
        staging.unlink()
    return True


def _remove_ended(path: Path, holder: dict) -> None:
    """Remove the lock of a process that has ended, unless another process has replaced it."""
    # One process at a time, or the second would remove the new lock of the first.
    taking = path.with_name(f"{path.name}-of-{holder['token']}")
    if _create(taking, ""):
        if _holder(path.parent) == holder:
            path.unlink()
        taking.unlink()


def _holder(folder: Path) -> dict | None:
    """Return what the lock file of a folder says, empty if it says nothing, None without one."""
    try:
        return read_object(folder / HOLDER)
    except OSError:
        return None
    except ValueError:
        return {}


def _has_ended(holder: dict) -> bool:
    """Return whether the process that holds a lock has provably ended."""
    process = _this_process()
    if (
        process["system"] is None
        or holder.get("system") != process["system"]
        or "token" not in holder
    ):
        return False
    number, started = holder.get("process"), holder.get("started")
    if not isinstance(number, int) or not isinstance(started, int):
        return False
    try:
        os.kill(number, 0)  # asks whether there is such a process
        return _ticks_at_start(number) != started
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # another user's, perhaps hidden
        return False


def _ticks_at_start(process: int) -> int:
    """Return when a process started, in ticks since its machine did, which no clock changes.

    psutil reckons from the time of day: after that is set, a process that runs seems another one.
    """
    fields = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()
    return int(fields[19])  # of proc(5), from the third on: starttime


def _this_process() -> dict:
    """Return what identifies this process among all of all machines."""
    try:  # process ids are those of one start of a machine, and of one container
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        system = f"{boot} {Path('/proc/self/ns/pid').readlink()}"
        started = _ticks_at_start(os.getpid())
    except OSError:
        system = started = None
    return {
        "host": socket.gethostname(),
        "system": system,
        "process": os.getpid(),
        "started": started,
    }
