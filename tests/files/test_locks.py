"""Locks of folders: held by one process, by flock or where there is none by a file."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import time

import psutil
import pytest

from pretrain_lib.files import locks
from pretrain_lib.files.locks import HOLDER, LOCK, is_locked, lock_folder

IN_USE = "data.path=.* is in use by "
HOLD = (
    "import sys; from pathlib import Path; from pretrain_lib.files.locks import lock_folder\n"
    "with lock_folder(Path(sys.argv[1]), setting='data.path'): print('held', flush=1); input()"
)


@pytest.fixture(params=[None, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def without_flock(request, monkeypatch):
    """Give this process a file system with flock, and the three answers of those without."""

    def refuse(*_):
        raise OSError(request.param, os.strerror(request.param))

    if request.param is not None:
        monkeypatch.setattr(fcntl, "flock", refuse)
    return request.param


def lock(folder):
    with lock_folder(folder, setting="data.path"):
        return sorted(path.name for path in folder.iterdir())


def test_a_lock_is_held_by_one_and_leaves_nothing(tmp_path, without_flock):
    folder = tmp_path / "a" / "b"
    with lock_folder(folder, setting="data.path"):
        names = [LOCK] if without_flock is None else [LOCK, HOLDER]
        assert sorted(path.name for path in folder.iterdir()) == names
        assert is_locked(folder)
        with pytest.raises(ValueError, match=IN_USE):
            lock(folder)
    assert list(tmp_path.iterdir()) == []
    folder.mkdir(parents=True)
    lock(folder)  # the folder of the user stays
    assert list(folder.iterdir()) == []
    (folder / "file").touch()
    lock(folder)
    assert not is_locked(folder)
    assert not (folder / HOLDER).exists()


@pytest.fixture
def held(tmp_path):
    """A process that holds a folder as on a file system without flock."""
    code = HOLD.replace(
        "with", "import errno, fcntl\ndef no(*_): raise OSError(errno.ENOLCK, '')\n"
        "fcntl.flock = no\nwith"
    )  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "data")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield tmp_path / "data", process
    process.kill()
    process.communicate()


def test_the_file_of_another_process_is_respected_until_it_has_ended(held, without_flock):
    folder, process = held
    with pytest.raises(ValueError, match=rf"{IN_USE}process {process.pid} on .*, delete "):
        lock(folder)
    assert is_locked(folder)
    process.kill()
    process.wait()
    assert not is_locked(folder)
    lock(folder)
    assert not is_locked(folder)


@pytest.mark.parametrize("change", [{"system": "another machine"}, {"token": None}, None])
def test_what_is_not_provably_stale_is_not_taken_over(held, monkeypatch, change):
    folder, process = held
    process.kill()
    process.wait()
    content = json.loads((folder / HOLDER).read_text())
    if change is None:
        (folder / HOLDER).write_text("")
    else:
        changed = {k: v for k, v in (content | change).items() if v is not None}
        (folder / HOLDER).write_text(json.dumps(changed))
    before = (folder / HOLDER).read_text()
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "")))
    with pytest.raises(ValueError, match=IN_USE):
        lock(folder)
    assert (folder / HOLDER).read_text() == before


def test_a_process_id_that_was_given_out_again_is_another_process(held):
    folder, process = held
    content = json.loads((folder / HOLDER).read_text())
    (folder / HOLDER).write_text(json.dumps(content | {"started": content["started"] - 1}))
    assert not is_locked(folder)
    assert process.poll() is None


def test_a_lock_is_held_though_the_clock_is_set(held, monkeypatch):
    folder, process = held
    created = psutil.Process.create_time
    started = json.loads((folder / HOLDER).read_text())["started"] / os.sysconf("SC_CLK_TCK")
    assert abs(psutil.boot_time() + started - created(psutil.Process(process.pid))) < 2
    # Setting the time of day moves all that is reckoned from it.
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: created(self) - 3600)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert is_locked(folder)
    with pytest.raises(ValueError, match=IN_USE):
        lock(folder)


def test_a_lock_that_was_taken_over_meanwhile_stays(tmp_path):
    path = tmp_path / HOLDER
    path.write_text('{"token": "new"}')
    locks._remove_ended(path, {"token": "old"})
    assert path.read_text() == '{"token": "new"}'
    assert [file.name for file in tmp_path.iterdir()] == [HOLDER]


def test_the_file_shows_signs_of_life_while_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "")))
    with lock_folder(tmp_path, setting="data.path"):
        os.utime(tmp_path / HOLDER, (0, 0))
        deadline = time.monotonic() + 300
        while (tmp_path / HOLDER).stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_link_in_the_place_of_the_lock_leaves_its_file_as_it_is(tmp_path):
    (tmp_path / "own.txt").write_text("some text")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / LOCK).symlink_to(tmp_path / "own.txt")
    lock(tmp_path / "data")
    assert (tmp_path / "own.txt").read_text() == "some text"
