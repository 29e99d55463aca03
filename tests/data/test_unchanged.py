"""A source that changes while it is prepared is refused, and what was written is never mixed."""

import json
import os

import fsspec
import pytest

from pretrain_lib import Job, prepare
from pretrain_lib.data.prepare import prepare as prepare_module
from pretrain_lib.data.remote import Unreachable
from pretrain_lib.data.text import sources, unchanged
from pretrain_lib.data.text.opening import open_source

CHANGED = "a.jsonl has changed while it was read"


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", (2**13, 2**13))


@pytest.fixture
def before_unit(monkeypatch):
    """Return what sets a function to call before the third unit is read."""
    write_unit = prepare_module._write_unit

    def set_change(change):
        def write(task, *others):
            if task[1] == 2:
                change()
            return write_unit(task, *others)

        monkeypatch.setattr(prepare_module, "_write_unit", write)

    return set_change


def lines(word):
    return "".join(json.dumps({"text": f"{word} document {i:05d}"}) + "\n" for i in range(1000))


def write_again(file):
    file.write_text(lines("new"))
    os.utime(file, ns=(0, 0))  # a clock may be coarse


CHANGES = {
    "replaced by as many bytes": write_again,
    "appended to": lambda file: file.write_text(lines("old") + lines("new")),
    "truncated": lambda file: os.truncate(file, 30_000),
    "removed": os.unlink,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_local_file_that_changes_is_refused(change, before_unit, tmp_path):
    file, out = tmp_path / "text" / "a.jsonl", tmp_path / "out"
    file.parent.mkdir()
    file.write_text(lines("old"))
    job, options = Job((str(file.parent),), train_tokenizer=300), {"workers": 1, "quiet": True}
    expected = prepare(job, tmp_path / "expected", **options)
    status = file.stat()
    before_unit(lambda: CHANGES[change](file))
    with pytest.raises(ValueError, match=CHANGED) as error:
        prepare(job, out, **options)
    assert "\n" not in str(error.value) and not (out / "manifest.json").exists()
    # What was written is of the file as it was: with that back in its place, the job goes on.
    file.write_text(lines("old"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    before_unit(lambda: None)
    assert prepare(job, out, **options)["fingerprint"] == expected["fingerprint"]


def test_a_remote_file_that_changes_is_refused_and_what_was_written_dropped(before_unit, tmp_path):
    storage, url = fsspec.filesystem("memory"), "memory://changing"
    storage.pipe(f"{url}/a.jsonl", lines("old").encode())
    job, options = Job((url,), train_tokenizer=300), {"workers": 1, "quiet": True}
    before_unit(lambda: storage.pipe(f"{url}/a.jsonl", lines("new").encode()))
    with pytest.raises(ValueError, match=CHANGED):
        prepare(job, tmp_path / "out", **options)
    assert not list((tmp_path / "out").glob("*.bin"))
    before_unit(lambda: storage.pipe(f"{url}/b.jsonl", lines("more").encode()))  # another file
    found = prepare(job, tmp_path / "out", **options)
    assert found["sources"] == [url] and (tmp_path / "out" / "manifest.json").exists()
    storage.rm(url, recursive=True)


def test_a_storage_that_does_not_answer_at_the_end_costs_nothing(monkeypatch, tmp_path):
    storage, url = fsspec.filesystem("memory"), "memory://going"
    storage.pipe(f"{url}/a.jsonl", lines("old").encode())
    job, options = Job((url,), train_tokenizer=300), {"workers": 1, "quiet": True}

    def fail(*_):
        raise Unreachable("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(unchanged, "find_remote", fail)
        with pytest.raises(ValueError, match="no answer"):
            prepare(job, tmp_path / "out", **options)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.bin")}
    prepare(job, tmp_path / "out", **options)
    assert written
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.bin")} == written
    storage.rm(url, recursive=True)


def test_the_states_are_those_of_the_opening(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(lines("old"))
    source = open_source(str(file))
    write_again(file)
    with pytest.raises(ValueError, match=CHANGED):
        list(source.documents(source.units()[0]))
