"""Text behind URLs: a real S3 server on loopback, which fails for a while or goes away."""

import gzip
import json
import signal
import subprocess
import sys

import fsspec
import pyarrow as pa
import pytest
from pyarrow import parquet

from pretrain_lib.data import remote
from pretrain_lib.data.overlap import find_overlap
from pretrain_lib.data.prepare.job import Job
from pretrain_lib.data.prepare.prepare import prepare
from pretrain_lib.data.text import sources
from pretrain_lib.data.text.opening import open_source
from tests.data.s3 import SECRETS, upload

pytestmark = pytest.mark.moderate

TEXTS = [f"document {i} of words, " * (3 + i % 40) for i in range(900)]


@pytest.fixture(scope="module")
def folder(s3, tmp_path_factory):
    """A local folder of every format, which is also in `s3://corpus/in`."""
    folder = tmp_path_factory.mktemp("texts") / "in"
    (folder / "inner" / ".ipynb_checkpoints").mkdir(parents=True)
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (folder / "a.jsonl").write_text("".join(lines[:300]))
    (folder / "inner" / "b.JSONL.gz").write_bytes(gzip.compress("".join(lines[300:600]).encode()))
    parquet.write_table(pa.table({"text": TEXTS[600:]}), folder / "c.parquet", row_group_size=50)
    (folder / "d.txt").write_text("one more document, not a long one, " * 200)
    (folder / "inner" / ".ipynb_checkpoints" / "a.jsonl").write_text("".join(lines[:300]))
    (folder / "notes.csv").write_text("a,b")
    upload(folder, "in")
    return folder


def job(name):
    return Job((str(name),), train_tokenizer=300)


@pytest.fixture(scope="module")
def local(folder, tmp_path_factory):
    """The manifest of the local folder."""
    return prepare(job(folder), tmp_path_factory.mktemp("local"), quiet=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_tokens_are_those_of_the_local_folder(local, tmp_path, workers, monkeypatch):
    monkeypatch.setattr("pretrain_lib.data.prepare.prepare.WORKER_BYTES", 2**10)
    manifest = prepare(job("s3://corpus/in"), tmp_path, workers=workers, quiet=True)
    assert manifest["fingerprint"] == local["fingerprint"]
    assert manifest["left_out"]["skipped_files"] == {".csv": 1, "hidden": 1}
    for path in tmp_path.rglob("*"):
        for secret in SECRETS.values():
            assert path.is_dir() or secret.encode() not in path.read_bytes()


def test_a_changed_file_is_another_job(folder, tmp_path):
    storage = fsspec.filesystem("s3")
    storage.pipe_file("corpus/changing/a.jsonl", b'{"text": "some words"}\n' * 200)
    before = job("s3://corpus/changing").record()
    assert job("s3://corpus/changing").record() == before
    storage.pipe_file("corpus/changing/a.jsonl", b'{"text": "same words"}\n' * 200)
    assert job("s3://corpus/changing").record() != before


def test_the_overlap_is_found_in_remote_documents(folder, tmp_path):
    (tmp_path / "items.jsonl").write_text(json.dumps({"text": TEXTS[5]}) + "\n")
    options = {"ngram": 9, "workers": 1, "quiet": True}
    report = find_overlap(["s3://corpus/in"], [tmp_path / "items.jsonl"], **options)
    (item,) = report.files[0].overlaps
    assert item.file == "s3://corpus/in/a.jsonl"


def test_a_server_that_fails_for_a_while_is_asked_again(s3, local, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0.01, 0.01))
    s3.failures, s3.failed = 2, 0
    manifest = prepare(job("s3://corpus/in"), tmp_path, workers=1, quiet=True)
    assert manifest["fingerprint"] == local["fingerprint"]
    assert s3.failed == 2


def test_a_folder_with_many_is_one_listing_in_the_order_of_the_local_one(s3, tmp_path):
    for number in range(30):
        (tmp_path / f"{number % 3}-{number}").mkdir()
        (tmp_path / f"{number % 3}-{number}" / "a.txt").write_text(f"text {number}")
        (tmp_path / f"{number % 3}-{number}.txt").write_text(f"file {number}")
    upload(tmp_path, "many")
    fsspec.filesystem("s3").touch("corpus/many/console.txt/")  # what a console makes as a folder
    s3.failing, s3.passing = "list-type", 1000
    source = open_source("s3://corpus/many")
    requests, s3.failing, s3.passing = 1000 - s3.passing, "jsonl", 0
    assert requests <= 3
    names = [str(path).removeprefix("s3://corpus/many/") for path in source.files]
    local = open_source(str(tmp_path)).files
    assert names == [str(path.relative_to(tmp_path)) for path in local]


# Prepares the remote folder in small units and kills itself at a call of fsync.
RUN = """
import os, signal, sys
from pathlib import Path
from pretrain_lib.data.prepare.job import Job
from pretrain_lib.data.prepare.prepare import prepare
from pretrain_lib.data.text import sources

def sync_or_die(descriptor, sync=os.fsync, left=[int(sys.argv[2])]):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    sync(descriptor)

os.fsync, sources.UNIT_BYTES = sync_or_die, (2**14, 2**14)
prepare(Job(("s3://corpus/in",), train_tokenizer=300), Path(sys.argv[1]), workers=1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("fatal_sync", [25, 60])
def test_killed_and_resumed_it_gives_the_same(folder, tmp_path, fatal_sync, monkeypatch):
    arguments = [sys.executable, "-c", RUN, tmp_path / "killed", str(fatal_sync)]
    assert subprocess.run(arguments, capture_output=True).returncode == -signal.SIGKILL
    assert list((tmp_path / "killed").glob("unit-*.json"))
    assert not (tmp_path / "killed" / "manifest.json").exists()
    monkeypatch.setattr(sources, "UNIT_BYTES", (2**14, 2**14))
    found = prepare(job("s3://corpus/in"), tmp_path / "killed", workers=1, quiet=True)
    expected = prepare(job(folder), tmp_path / "local", workers=1, quiet=True)
    assert found["fingerprint"] == expected["fingerprint"]


def test_a_server_that_is_gone_is_said_in_one_line(monkeypatch, folder):
    monkeypatch.setattr(remote, "RETRY_SECONDS", ())
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(ValueError, match="s3://corpus/in cannot be read .*; once it can, start"):
        open_source("s3://corpus/in")
    fsspec.filesystem("s3").clear_instance_cache()


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("s3://corpus/nothing", "there is no such file or folder"),
        ("s3://key:secret@corpus/in", "s3://corpus/in: the URL holds credentials"),
        ("https://host/a.jsonl?X-Amz-Signature=abc", "https://host/a.jsonl: the URL holds cred"),
        ("nowhere://corpus/in", "no storage of this protocol"),
        ("s3://corpus/in/notes.csv", "must end in|holds none of"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(folder, url, reason):
    with pytest.raises(ValueError, match=reason) as error:
        open_source(url)
    assert "secret" not in str(error.value) and "abc" not in str(error.value)


def test_files_in_memory_are_read():
    storage = fsspec.filesystem("memory")
    storage.pipe_file("/texts/a.txt", b"a text")
    (source,) = [open_source("memory://texts")]
    ((document,),) = [list(source.documents(unit)) for unit in source.units()]
    assert document.text == "a text"
