"""Prepare: bytes that depend on the job alone, restarts after kills, splits that never overlap."""

import contextlib
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, IterableDataset, interleave_datasets, load_dataset
from tokenizers import normalizers

from pretrain_lib.data.prepare import groups
from pretrain_lib.data.prepare import job as job_module
from pretrain_lib.data.prepare import prepare as prepare_module
from pretrain_lib.data.prepare.holdout import parse_validation
from pretrain_lib.data.prepare.job import Job
from pretrain_lib.data.prepare.left_out import describe_left_out
from pretrain_lib.data.prepare.prepare import prepare
from pretrain_lib.data.text import sources
from pretrain_lib.data.text.dataset_rows import DatasetSource, HubSource
from pretrain_lib.data.text.opening import open_source
from pretrain_lib.data.text.tokenizer import load_tokenizer, train_tokenizer
from pretrain_lib.data.tokens.arrays import open_split
from pretrain_lib.data.tokens.verify import verify_folder
from pretrain_lib.errors import BAD_INPUT, report_errors
from pretrain_lib.files.writes import STAGING, staged

pytestmark = pytest.mark.moderate

CODE = Path(json.decoder.__file__).read_text() + Path(random.__file__).read_text()

# Prepares one job a line, each in a process of its own that can be killed. These are forked, for
# importing the library takes longer than the work.
RUNNER = """
import json, os, resource, signal, sys
from pathlib import Path
from pretrain_lib.data.prepare import prepare as module
from pretrain_lib.data.text import sources
from pretrain_lib.data.prepare.job import Job

def sync_or_die(descriptor):
    global syncs
    syncs -= 1
    if syncs == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    sync(descriptor)

def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def run(folder, workers, unit_bytes, fatal_sync, job):
    global syncs
    before = peak_bytes()
    module.WORKER_BYTES = 1
    sources.UNIT_BYTES = unit_bytes and (unit_bytes, unit_bytes) or sources.UNIT_BYTES
    if fatal_sync:
        syncs, os.fsync = fatal_sync, sync_or_die
    module.prepare(Job(**job), Path(folder), workers=workers, quiet=True)
    Path(folder, ".memory").write_text(str(peak_bytes() - before))

if __name__ == "__main__":
    sync = os.fsync
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            try:
                run(**json.loads(line))
                os._exit(0)
            finally:
                os._exit(1)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Runner:
    """Runs `prepare` in processes of their own, one at a time."""

    def __init__(self, folder):
        (folder / "run.py").write_text(RUNNER)
        command = [sys.executable, str(folder / "run.py")]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def start(self, folder, *, workers=1, unit_bytes=3000, fatal_sync=0, **job):
        options = {"workers": workers, "unit_bytes": unit_bytes, "fatal_sync": fatal_sync}
        line = json.dumps({"folder": str(folder), **options, "job": job})
        print(line, file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def wait(self):
        return int(self.process.stdout.readline())

    def run(self, folder, **options):
        self.start(folder, **options)
        return self.wait()


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    found = Runner(tmp_path_factory.mktemp("runner"))
    yield found
    found.process.communicate()


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def write_texts(folder, *, count=60, seed=0, extra=()):
    """Write documents with text of their own, blank ones and `extra` into two .jsonl files."""
    draw, words = random.Random(seed), ["ab", "cd", "ef", "gü"]
    texts = [f"{i} " + " ".join(draw.choices(words, k=30)) for i in range(count)]
    texts = [*texts[: count // 2], "", " \n", *extra, *texts[count // 2 :]]
    folder.mkdir()
    for name, part in (("a", texts[: count // 3]), ("b", texts[count // 3 :])):
        lines = [json.dumps({"text": text}) + "\n" for text in part]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return texts


def read_ids(folder, split):
    """Return all ids of a split, and where its documents end, in the order of the manifest."""
    ids, ends = [], []
    for shard in json.loads((folder / "manifest.json").read_text())["splits"][split]["shards"]:
        path = folder / f"{shard['name']}.bin"
        found = np.load(path.with_suffix(".ends.npy"), allow_pickle=False).tolist()
        ends += [end + len(ids) for end in found]
        ids += np.fromfile(path, dtype="<u2").tolist()
    return ids, ends


def read_documents(folder, split):
    """Return the ids of each document, in the order of the shards."""
    ids, ends = read_ids(folder, split)
    return [ids[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def read_texts(folder, split):
    tokenizer, documents = load_tokenizer(folder / "tokenizer"), read_documents(folder, split)
    assert {ids[0] for ids in documents} <= {tokenizer.end_of_text_id}
    return [tokenizer.decode(ids[1:]) for ids in documents]


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", (1500, 1500))


@pytest.fixture
def small_texts_for_workers(monkeypatch):
    monkeypatch.setattr(prepare_module, "WORKER_BYTES", 1)


def test_bytes_do_not_depend_on_the_number_of_workers(
    tmp_path, small_units, small_texts_for_workers
):
    write_texts(tmp_path / "text", extra=['"' * 3000])
    (tmp_path / "text" / "c.txt").write_text(CODE)
    (tmp_path / "text" / "d.jsonl").write_bytes(b'{"no": "text"}\n{"text": "text"}\n' * 30)
    for validation in ("hash:0.2", "first:5000"):
        job = Job((str(tmp_path / "text"),), train_tokenizer=300, validation=validation)
        folders = [tmp_path / f"{validation}-{workers}" for workers in (1, 2, 3)]
        for workers, folder in enumerate(folders, start=1):
            manifest = prepare(job, folder, workers=workers, quiet=True)
        assert sum(len(split["shards"]) for split in manifest["splits"].values()) > 20
        assert contents(folders[0]) == contents(folders[1]) == contents(folders[2])
        assert verify_folder(folders[0]) == []


@pytest.mark.parametrize("fatal_sync", [1, 3, 9, 14, 15, 27])
def test_killed_at_any_write_and_run_again_gives_the_same_bytes(tmp_path, runner, fatal_sync):
    write_texts(tmp_path / "text")
    job = {"sources": [str(tmp_path / "text")], "train_tokenizer": 300, "validation": "hash:0.2"}
    assert runner.run(tmp_path / "whole", **job) == 0
    assert runner.run(tmp_path / "killed", fatal_sync=fatal_sync, **job) == -signal.SIGKILL
    unfinished = "prepare.*did not finish" if fatal_sync > 1 else "it is not a prepared folder"
    with pytest.raises(ValueError, match=unfinished):
        open_split(tmp_path / "killed", "train")
    assert runner.run(tmp_path / "killed", **job) == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_killed_again_and_again_still_comes_to_the_same_end(tmp_path, runner):
    write_texts(tmp_path / "text")
    job = {"sources": [str(tmp_path / "text")], "train_tokenizer": 300, "validation": "hash:0.2"}
    assert runner.run(tmp_path / "whole", **job) == 0
    ends = []
    while 0 not in ends and len(ends) < 30:
        ends.append(runner.run(tmp_path / "out", fatal_sync=13, **job))
    assert len(ends) > 3
    assert ends == [-signal.SIGKILL] * (len(ends) - 1) + [0]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "kills", "unit_bytes"), [(1, 14, 1500), (2, 6, 250)])
def test_killed_at_random_instants_it_comes_to_the_same_end(
    tmp_path, runner, workers, kills, unit_bytes
):
    write_texts(tmp_path / "text", count=400)
    (tmp_path / "text" / "c.txt").write_text(CODE)
    job = {"sources": [str(tmp_path / "text")], "train_tokenizer": 300, "validation": "hash:0.2"}
    options = {"workers": workers, "unit_bytes": unit_bytes, **job}
    started = time.monotonic()
    assert runner.run(tmp_path / "whole", **options) == 0
    duration, draw = time.monotonic() - started, random.Random(workers)
    expected, number = contents(tmp_path / "whole"), 0
    while kills:
        pid = runner.start(tmp_path / f"{number}", **options)
        time.sleep(draw.uniform(0, duration))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        if runner.wait() == -signal.SIGKILL:
            kills -= 1
        else:  # it was done before its instant: the next one is another run's
            assert contents(tmp_path / f"{number}") == expected
            number += 1
    assert runner.run(tmp_path / f"{number}", **options) == 0
    assert contents(tmp_path / f"{number}") == expected
    assert not list(tmp_path.rglob(f"*.{STAGING}"))


def test_kill_while_the_tokenizer_is_written_does_not_spoil_the_folder(tmp_path):
    write_texts(tmp_path / "text")
    job = Job((str(tmp_path / "text"),), train_tokenizer=300, validation="none")
    prepare(job, tmp_path / "whole", quiet=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        folder = staged(tmp_path / f"cut {name}" / "tokenizer")  # renamed once it is whole
        folder.mkdir(parents=True)
        shutil.copy(tmp_path / "whole" / "job.json", folder.parent)  # written before
        whole = contents(tmp_path / "whole" / "tokenizer")
        for other, content in whole.items():
            if other <= name:  # the order in which they are written
                (folder / other).write_bytes(content if other != name else content[:20])
        shutil.copy(tmp_path / "whole" / "job.json", folder.parent)  # written before
        prepare(job, folder.parent, quiet=True)
        assert contents(folder.parent) == contents(tmp_path / "whole")


def test_second_prepare_changes_nothing(tmp_path, small_units):
    write_texts(tmp_path / "text")
    job = Job((str(tmp_path / "text"),), train_tokenizer=300)
    first = prepare(job, tmp_path / "out", quiet=True)
    files = [p for p in (tmp_path / "out").rglob("*") if p.name != ".lock"]
    before = {path: path.stat().st_mtime_ns for path in files}
    assert prepare(job, tmp_path / "out", quiet=True) == first
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert {p for p in (tmp_path / "out").rglob("*") if p.name != ".lock"} == set(before)


def test_another_job_in_the_same_folder_is_refused_and_the_difference_named(tmp_path):
    write_texts(tmp_path / "text")
    write_texts(tmp_path / "other", seed=1)
    prepare(Job((str(tmp_path / "text"),), train_tokenizer=300), tmp_path / "out", quiet=True)
    before = contents(tmp_path / "out")
    for source, vocabulary, validation, named in (
        ("other", 300, "hash", "sources: text there, other requested"),
        ("text", 301, "hash", "tokenizer: trained, 300 ids there, trained, 301 ids requested"),
        ("text", 300, "none", "validation: hash there, none requested"),
    ):
        job = Job((str(tmp_path / source),), train_tokenizer=vocabulary, validation=validation)
        with pytest.raises(ValueError, match=f"prepared differently .*{named}"):
            prepare(job, tmp_path / "out", quiet=True)
    next(p for p in (tmp_path / "text").rglob("*") if p.is_file()).write_bytes(b"changed")
    job = Job((str(tmp_path / "text"),), train_tokenizer=300)
    with pytest.raises(ValueError, match=r"prepared differently \(the text of text has changed"):
        prepare(job, tmp_path / "out", quiet=True)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("validation", ["none", "hash:0.3"])
def test_shards_hold_exactly_the_documents_with_text(tmp_path, small_units, validation):
    texts = write_texts(tmp_path / "text", extra=["same text", "same text"])
    job = Job((str(tmp_path / "text"),), train_tokenizer=300, validation=validation)
    manifest = prepare(job, tmp_path / "out", quiet=True)
    assert len(manifest["splits"]["train"]["shards"]) > 2
    written = [
        text for split in ("train", "validation") for text in read_texts(tmp_path / "out", split)
    ]
    expected = [text for text in texts if text.strip()]
    assert Counter(written) == Counter(expected)
    for split, record in manifest["splits"].items():
        documents = read_documents(tmp_path / "out", split)
        ids = [i for document in documents for i in document]
        assert record["documents"] == len(documents)
        assert record["tokens"] == len(ids)
        assert record["text_bytes"] == sum(
            len(text.encode()) for text in read_texts(tmp_path / "out", split)
        )
        assert (record["lowest_id"], record["highest_id"]) == (
            min(ids, default=None),
            max(ids, default=None),
        )
        array, ends, total = open_split(tmp_path / "out", split), [], 0
        for document in documents:
            total += len(document)
            ends.append(total)
        if documents:
            assert array.document_ends(0, len(array)).tolist() == ends[:-1]
    assert verify_folder(tmp_path / "out") == []


def test_documents_of_a_unit_are_shuffled(tmp_path):
    texts = [text for text in write_texts(tmp_path / "text") if text.strip()]
    job = Job((str(tmp_path / "text"),), train_tokenizer=300, validation="none")
    prepare(job, tmp_path / "out", quiet=True)
    train = read_texts(tmp_path / "out", "train")
    assert train != texts
    assert sorted(train) == sorted(texts)


def test_hash_validation_puts_duplicates_on_one_side(tmp_path, small_units):
    doubled = [f"document {i}" for i in range(40)] * 3
    write_texts(tmp_path / "text", extra=doubled)
    job = Job((str(tmp_path / "text"),), train_tokenizer=300, validation="hash:0.3")
    prepare(job, tmp_path / "out", quiet=True)
    train, validation = (read_texts(tmp_path / "out", split) for split in ("train", "validation"))
    assert not set(train) & set(validation)
    assert 0.1 < len(set(validation)) / len(set(train + validation)) < 0.5
    counts = Counter(train + validation)
    assert all(counts[text] == 3 for text in doubled)


def save_tokenizer(folder, texts, *, normalizer=None):
    """Train a tokenizer; with a normalizer it is none that `tiktoken` can stand in for."""
    tokenizer = train_tokenizer(texts, vocabulary_size=400)
    tokenizer.backend.normalizer = normalizer
    tokenizer.save(folder)
    return tokenizer


def rows_of(tokenizer, texts):
    return [ids.tolist() for ids in tokenizer.encode_documents(texts)]


# Texts to be cut: one with a byte order mark, one whose last part is white space alone.
LARGE = [CODE, "\ufeff" + CODE[1000:9000], "Größe 12 大きさ, 3 " * 400, "9" * 1600 + "\n" * 5000]
LARGE_TEXTS = [text.removeprefix("\ufeff") for text in LARGE]


def write_large(folder):
    folder.mkdir()
    for number, text in enumerate(LARGE):
        (folder / f"{number}.txt").write_text(text)
    (folder / "a.jsonl").write_text(json.dumps({"text": "a small one behind them"}))
    return [*LARGE_TEXTS, "a small one behind them"]


@pytest.mark.parametrize(
    ("normalizer", "encoder"), [(None, "gigatoken"), (normalizers.NFC(), "tokenizers")]
)
def test_a_text_that_is_cut_has_the_tokens_and_the_end_of_the_whole(
    tmp_path, small_units, normalizer, encoder
):
    texts = write_large(tmp_path / "text")
    tokenizer = save_tokenizer(tmp_path / "tokenizer", LARGE, normalizer=normalizer)
    options = {"tokenizer": str(tmp_path / "tokenizer"), "validation": "none"}
    manifest = prepare(Job((str(tmp_path / "text"),), **options), tmp_path / "out", quiet=True)
    assert manifest["encoder"] == encoder
    rows = rows_of(tokenizer, texts)
    assert read_documents(tmp_path / "out", "train") == rows
    train = manifest["splits"]["train"]
    assert len(train["shards"]) > 30
    assert (train["documents"], train["tokens"]) == (5, sum(map(len, rows)))
    assert train["text_bytes"] == sum(len(text.encode()) for text in texts)
    array, ends = open_split(tmp_path / "out", "train"), np.cumsum([len(row) for row in rows])
    assert array.read(0, len(array)).tolist() == sum(rows, [])
    assert array.document_ends(0, len(array)).tolist() == ends[:-1].tolist()
    assert verify_folder(tmp_path / "out") == []


def test_a_text_is_not_cut_for_a_tokenizer_whose_tokens_that_moves(tmp_path, small_units):
    texts = write_large(tmp_path / "text")
    tokenizer = save_tokenizer(tmp_path / "tokenizer", LARGE, normalizer=normalizers.Strip())
    options = {"tokenizer": str(tmp_path / "tokenizer"), "validation": "none"}
    manifest = prepare(Job((str(tmp_path / "text"),), **options), tmp_path / "out", quiet=True)
    assert sorted(read_documents(tmp_path / "out", "train")) == sorted(rows_of(tokenizer, texts))
    assert len(manifest["splits"]["train"]["shards"]) <= 5


def test_all_parts_of_a_text_are_on_one_side(tmp_path, small_units):
    (tmp_path / "text").mkdir()
    texts = [f"{number} " + CODE[number * 100 :][:9000] for number in range(12)]
    for number, text in enumerate(texts):
        (tmp_path / "text" / f"{number:02d}.txt").write_text(text)
    job = Job((str(tmp_path / "text"),), train_tokenizer=300, validation="hash:0.4")
    manifest = prepare(job, tmp_path / "out", quiet=True)
    train, validation = (read_texts(tmp_path / "out", split) for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(texts)
    assert train == sorted(train, key=texts.index)
    assert len(train) >= 2 <= len(validation)
    assert all(len(split["shards"]) > 10 for split in manifest["splits"].values())


@pytest.mark.parametrize("groups_bytes", [1, 300, 2**20])
def test_a_unit_larger_than_memory_is_written_in_groups(tmp_path, monkeypatch, groups_bytes):
    monkeypatch.setattr(groups, "GROUP_BYTES", groups_bytes)
    texts = [text for text in write_texts(tmp_path / "text") if text.strip()]
    job = Job((str(tmp_path / "text"),), train_tokenizer=300, validation="hash:0.3")
    manifest = prepare(job, tmp_path / "out", quiet=True)
    written = [read_texts(tmp_path / "out", split) for split in ("train", "validation")]
    assert sorted(chain(*written)) == sorted(texts)
    for split, record in manifest["splits"].items():
        names = [shard["name"] for shard in record["shards"]]
        assert names == [f"{split}-00000-{number:03d}" for number in range(len(names))]
        sizes = [shard["text_bytes"] for shard in record["shards"]]
        assert all(size >= groups_bytes for size in sizes[:-1])
        if groups_bytes == 1:
            assert len(names) == record["documents"]


@pytest.mark.parametrize("amount", [1, 2, 200, 1500])
def test_first_validation_is_exactly_the_first_tokens_of_the_source(tmp_path, small_units, amount):
    texts = [text for text in write_texts(tmp_path / "text") if text.strip()]
    job = Job((str(tmp_path / "text"),), train_tokenizer=300, validation=f"first:{amount}")
    prepare(job, tmp_path / "out", quiet=True)
    rows = rows_of(load_tokenizer(tmp_path / "out" / "tokenizer"), texts)
    held_out, remaining = split_rows(rows, amount)
    assert read_documents(tmp_path / "out", "validation") == held_out
    assert sorted(read_documents(tmp_path / "out", "train")) == sorted(remaining)


def split_rows(rows, amount):
    """Cut rows of ids after so many of them all: the rows before and those behind."""
    before, behind = [], []
    for row in rows:
        before += [row[:amount]] if amount else []
        behind += [row[amount:]] if row[amount:] else []
        amount -= min(amount, len(row))
    return before, behind


@pytest.mark.parametrize("place", ["begin", "first part", "border", "file", "last", "behind"])
@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()])
def test_first_validation_ends_anywhere_in_a_text_that_is_cut(
    tmp_path, small_units, place, normalizer
):
    texts = write_large(tmp_path / "text")
    tokenizer = save_tokenizer(tmp_path / "tokenizer", LARGE, normalizer=normalizer)
    rows = rows_of(tokenizer, texts)
    source = open_source(str(tmp_path / "text"))
    (first,), (second,) = (list(source.documents(unit)) for unit in source.units()[:2])
    border = sum(len(row) for row in rows_of(tokenizer, [first.text, second.text])) - 1
    before_last = sum(map(len, rows[:3]))
    amount = {
        "begin": 1,
        "first part": 100,
        "border": border,
        "file": len(rows[0]),
        "last": before_last + len(rows[3]) - 2,
        "behind": before_last + len(rows[3]) + 2,
    }[place]
    options = {"tokenizer": str(tmp_path / "tokenizer"), "validation": f"first:{amount}"}
    manifest = prepare(Job((str(tmp_path / "text"),), **options), tmp_path / "out", quiet=True)
    held_out, remaining = split_rows(rows, amount)
    assert read_documents(tmp_path / "out", "validation") == held_out
    assert read_documents(tmp_path / "out", "train") == remaining
    for split, found in (("validation", held_out), ("train", remaining)):
        assert manifest["splits"][split]["documents"] == len(found)
        assert manifest["splits"][split]["tokens"] == sum(map(len, found))


def test_first_validation_that_ends_with_a_document_cuts_none(tmp_path, small_units):
    texts = [text for text in write_texts(tmp_path / "text") if text.strip()]
    tokenizer = train_tokenizer(texts, vocabulary_size=300)
    tokenizer.save(tmp_path / "tokenizer")
    amount = sum(len(tokenizer.encode(text)) + 1 for text in texts[:7])
    job = Job(
        (str(tmp_path / "text"),),
        tokenizer=str(tmp_path / "tokenizer"),
        validation=f"first:{amount}",
    )
    manifest = prepare(job, tmp_path / "out", quiet=True)
    assert read_texts(tmp_path / "out", "validation") == texts[:7]
    assert sorted(read_texts(tmp_path / "out", "train")) == sorted(texts[7:])
    assert manifest["splits"]["validation"]["tokens"] == amount
    for split, part in (("validation", texts[:7]), ("train", texts[7:])):
        size = sum(len(text.encode()) for text in part)
        assert manifest["splits"][split]["text_bytes"] == size


@pytest.mark.parametrize("amount", range(2, 9))
def test_first_validation_within_a_character_counts_each_byte_once(tmp_path, amount):
    texts = ["\U0001f600\u4f60", "ab"]  # a token for each byte, behind an end-of-text token each
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    job = Job((str(tmp_path / "a.jsonl"),), train_tokenizer=257, validation=f"first:{amount}")
    splits = prepare(job, tmp_path / "out", quiet=True)["splits"]
    sizes = {split: splits[split]["text_bytes"] for split in ("validation", "train")}
    assert sizes == {"validation": amount - 1, "train": 9 - (amount - 1)}


def test_a_tokenizer_is_trained_on_the_texts_as_they_are(tmp_path, small_units, monkeypatch):
    monkeypatch.setattr(job_module, "PIECE_CHARACTERS", 100)
    texts = [*write_texts(tmp_path / "text"), CODE]
    (tmp_path / "text" / "c.txt").write_text(CODE)
    job = Job((str(tmp_path / "text"),), train_tokenizer=600, validation="none")
    prepare(job, tmp_path / "out", quiet=True)
    expected = train_tokenizer(texts, vocabulary_size=600)
    assert load_tokenizer(tmp_path / "out" / "tokenizer").sha256 == expected.sha256


def test_several_sources_are_prepared_together(tmp_path):
    one, two = write_texts(tmp_path / "one", seed=1), write_texts(tmp_path / "two", seed=2)
    job = Job(
        (str(tmp_path / "one"), str(tmp_path / "two")), train_tokenizer=300, validation="none"
    )
    manifest = prepare(job, tmp_path / "out", quiet=True)
    assert manifest["sources"] == list(job.sources)
    expected = [text for text in one + two if text.strip()]
    assert sorted(read_texts(tmp_path / "out", "train")) == sorted(expected)


def write_with_bad_lines(folder):
    """Write three files in which every other line is none, and return the texts of the others."""
    folder.mkdir()
    for name in "abc":
        lines = [f'{{"text": "{name} {i}"}}\nno JSON {name}{i}\n' for i in range(10)]
        (folder / f"{name}.jsonl").write_text("".join(lines) + '{"text": " "}\n')
    return [f"{name} {i}" for name in "abc" for i in range(10)]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("validation", ["none", "hash:0.3", "first:40"])
def test_documents_that_are_left_out_are_counted_and_named(
    tmp_path, monkeypatch, small_texts_for_workers, workers, validation
):
    monkeypatch.setattr(sources, "UNIT_BYTES", (100, 100))
    texts = write_with_bad_lines(tmp_path / "text")
    job = Job((str(tmp_path / "text"),), train_tokenizer=300, validation=validation)
    manifest = prepare(job, tmp_path / "out", workers=workers, quiet=True)
    left_out = manifest["left_out"]
    assert (left_out["empty"], left_out["rejected"]) == (3, 30)
    places = [f"{tmp_path}/text/a.jsonl, line at byte {16 + 27 * number}: " for number in range(3)]
    for example, place, number in zip(left_out["examples"], places, range(3), strict=True):
        assert example == f"{place}not a JSON object in UTF-8: b'no JSON a{number}'"
    (reason,) = left_out["reasons"]
    first = places[0].removesuffix(": ")
    assert reason == {"reason": "not a JSON object in UTF-8", "documents": 30, "first": first}
    if not validation.startswith("first"):
        written = [read_texts(tmp_path / "out", split) for split in ("train", "validation")]
        assert sorted(chain(*written)) == sorted(texts)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("unit_bytes", [100, 2**20])
def test_too_many_documents_that_cannot_be_read_stop_it_in_one_line(
    tmp_path, monkeypatch, capsys, small_texts_for_workers, workers, unit_bytes
):
    monkeypatch.setattr(sources, "UNIT_BYTES", (unit_bytes, unit_bytes))
    texts = write_with_bad_lines(tmp_path / "text")
    options = {"train_tokenizer": 300, "validation": "none"}
    (source,) = names = (str(tmp_path / "text"),)

    def act(max_rejected):
        job = Job(names, max_rejected=max_rejected, **options)
        prepare(job, tmp_path / "out", workers=workers, quiet=True)

    for max_rejected in (0, 1, 29):
        assert report_errors(lambda limit=max_rejected: act(limit)) == BAD_INPUT
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f" could not be read, more than data.max_rejected={max_rejected};" in error
        if unit_bytes > 100:  # a unit is not read on
            assert error.startswith(f"error: {max_rejected + 1} document")
        assert f"{source}/a.jsonl, line at byte 16: " in error
        assert not (tmp_path / "out" / "manifest.json").exists()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("unit-*.json")}
    assert len(done) > 3 or unit_bytes > 100
    act(30)  # goes on where it stopped
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert sorted(read_texts(tmp_path / "out", "train")) == sorted(texts)


def test_a_damaged_file_is_refused_and_named_until_it_is_repaired(tmp_path):
    write_texts(tmp_path / "text")
    raw = gzip.compress(json.dumps({"text": "a text"}).encode())
    (tmp_path / "text" / "c.jsonl.gz").write_bytes(raw[:-5])
    job = Job((str(tmp_path / "text"),), train_tokenizer=300, validation="none")
    message = "c.jsonl.gz cannot be read behind document .*truncated.*restore the file"
    with pytest.raises(ValueError, match=message):
        prepare(job, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out" / "manifest.json").exists()
    (tmp_path / "text" / "c.jsonl.gz").write_bytes(raw + b"\0" * 9 + b"garbage")
    (tmp_path / "text" / "d.csv").write_text("a,b")
    left_out = prepare(job, tmp_path / "repaired", quiet=True)["left_out"]
    (warning,) = left_out["reasons"]
    assert (left_out["rejected"], warning["documents"]) == (0, 0)
    assert warning["first"] == str(tmp_path / "text" / "c.jsonl.gz")
    assert left_out["skipped_files"] == {".csv": 1}
    assert any("not read    files by kind: 1 .csv" in line for line in describe_left_out(left_out))


def test_a_separator_makes_documents_of_a_text_and_another_job(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", (2000, 2000))
    texts = [CODE[start : start + 300] for start in range(0, 9000, 300)]
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(texts))
    options = {"train_tokenizer": 300, "validation": "hash:0.2"}
    job = Job((str(tmp_path / "a.txt"),), document_separator="<|endoftext|>", **options)
    for workers in (1, 2):
        prepare(job, tmp_path / str(workers), workers=workers, quiet=True)
        written = [read_texts(tmp_path / str(workers), split) for split in ("train", "validation")]
        assert sorted(chain(*written)) == sorted(texts)
    assert job.record()["document_separator"] == "<|endoftext|>"
    plain = Job(job.sources, **options)
    assert "document_separator" not in plain.record()
    with pytest.raises(ValueError, match="was prepared differently .document_separator: "):
        prepare(plain, tmp_path / "1", quiet=True)


@pytest.mark.parametrize(
    ("separator", "rule"),
    [("", "must be a line"), ("a\nb", "must be a line"), ("<s>", "splits .txt files, of which")],
)
def test_a_separator_that_cannot_be_used_is_refused(tmp_path, separator, rule):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    with pytest.raises(ValueError, match=f"data.document_separator=.*{rule}"):
        job = Job((str(tmp_path),), train_tokenizer=300, document_separator=separator)
        job.open_sources()


def test_a_dataset_that_cannot_be_sent_to_workers_is_refused_in_one_line(
    tmp_path, small_texts_for_workers
):
    rows = IterableDataset.from_generator(
        lambda parts: ({"text": f"text {number}"} for number in parts),
        gen_kwargs={"parts": [0, 1, 2, 3]},
    )
    job = Job((DatasetSource(rows, "rows"),), train_tokenizer=300, validation="none")
    with pytest.raises(ValueError, match="data.source=rows cannot be sent to 2 worker") as error:
        prepare(job, tmp_path / "out", workers=2, quiet=True)
    assert "\n" not in str(error.value)
    assert "workers=1" in str(error.value)
    prepare(job, tmp_path / "out", workers=1, quiet=True)
    assert sorted(read_texts(tmp_path / "out", "train")) == [f"text {n}" for n in range(4)]


@pytest.mark.parametrize("validation", ["none", "first:100", "first:2000"])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("place", [0, 4000, -1])
@pytest.mark.parametrize("bad", [0, 1])
def test_a_text_of_which_a_part_is_left_out_keeps_the_others(
    tmp_path, small_units, small_texts_for_workers, validation, bad, place, workers
):
    """A part of the first or the second of two texts is not UTF-8."""
    (tmp_path / "text").mkdir()
    parts, expected = [], []
    for number, text in enumerate((CODE[:8000], CODE[9000:16000])):
        raw = bytearray(text.encode())
        if number == bad:
            raw[place] = 0xFF
        (tmp_path / "text" / f"{number}.txt").write_bytes(raw)
    source = open_source(str(tmp_path / "text"))
    for unit in source.units():
        parts += source.documents(unit)
    tokenizer = save_tokenizer(tmp_path / "tokenizer", LARGE)
    for part in parts:
        if hasattr(part, "text"):
            ids = tokenizer.encode(part.text)
            expected += [tokenizer.end_of_text_id, *ids] if part.begins else ids
    options = {"tokenizer": str(tmp_path / "tokenizer"), "validation": validation}
    job = Job((str(tmp_path / "text"),), **options)
    manifest = prepare(job, tmp_path / "out", workers=workers, quiet=True)
    assert manifest["left_out"]["rejected"] == 1
    written = {split: read_ids(tmp_path / "out", split) for split in ("validation", "train")}
    held_out, train = (ids for ids, _ in written.values())
    assert held_out == expected[: parse_validation(validation)[1]]
    assert held_out + train == expected
    for ids, ends in written.values():  # a document ends wherever the next one begins
        starts = [i for i, id in enumerate(ids) if id == tokenizer.end_of_text_id]
        assert ends == [*filter(None, starts), *[len(ids)] * bool(ids)]


def generate(parts, pids):
    for part in parts:
        Path(pids, str(os.getpid())).touch()
        yield from ({"text": f"{number} generated"} for number in part)


def shout(row):
    return {"text": row["text"].upper()}


def test_rows_of_datasets_are_tokenised_as_the_same_texts_in_a_file(tmp_path, monkeypatch):
    (tmp_path / "one" / "corpus").mkdir(parents=True)
    (tmp_path / "pids").mkdir()
    monkeypatch.chdir(tmp_path)  # where `datasets` finds one/corpus
    texts = [f"row {number}" for number in range(60)]
    parquet = Dataset.from_dict({"text": [*texts, None]})
    parquet.to_parquet(tmp_path / "one" / "corpus" / "train.parquet", batch_size=20)
    options = {"parts": [range(20), range(20, 30)], "pids": str(tmp_path / "pids")}
    generated = IterableDataset.from_generator(generate, gen_kwargs=options)
    streamed = load_dataset("one/corpus", split="train", streaming=True)
    in_memory = Dataset.from_dict({"text": texts})
    several = interleave_datasets(
        [generated, in_memory.to_iterable_dataset(2)],
        stopping_strategy="all_exhausted_without_replacement",
    )
    made = [f"{number} generated" for number in range(30)]
    datasets = (in_memory, generated, streamed.take(45).map(shout), several)
    all_sources = [DatasetSource(rows, f"{i}") for i, rows in enumerate(datasets)]
    all_sources.append(HubSource("one/corpus", "text"))
    all_texts = [*texts, *made, *map(str.upper, texts[:45]), *made, *texts, *texts]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in all_texts))
    save_tokenizer(tmp_path / "tokenizer", all_texts)
    options = {"tokenizer": str(tmp_path / "tokenizer"), "validation": "hash:0.2"}
    for workers in (1, 2):
        folder = tmp_path / f"{workers}"
        prepare(Job(tuple(all_sources), **options), folder, workers=workers, quiet=True)
    prepare(Job((str(tmp_path / "a.jsonl"),), **options), tmp_path / "file", quiet=True)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    for split in ("train", "validation"):
        found, expected = (read_documents(tmp_path / f, split) for f in ("1", "file"))
        assert sorted(found) == sorted(expected)
    assert len(list((tmp_path / "pids").iterdir())) > 1  # this process, and others


# `most` is in sizes of the text, beyond what a text of one unit or less needs.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "normalizer", "size", "most"),
    [
        # Measured: 5; 130 if `tokenizers` is given all of it at once.
        ("a.jsonl", normalizers.NFC(), 8 * 2**20, 25),
        # Measured: 0.4, for shards that wait to be written; 4.7 if the file is not cut.
        ("a.txt", None, 60 * 2**20, 1.5),
    ],
)
def test_memory_is_bounded_for_one_large_document(tmp_path, runner, name, normalizer, size, most):
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randrange(2, 30))) for _ in range(500)]
    text = " ".join(draw.choices(words, k=5000)) + "\n"
    save_tokenizer(tmp_path / "tokenizer", [text], normalizer=normalizer)
    memory = []
    for length in (min(size // 15, 4 * 2**20), size):
        own, folder = text * (length // len(text)), tmp_path / f"{length}"
        folder.mkdir()
        (folder / name).write_text(own if name == "a.txt" else json.dumps({"text": own}))
        job = {"sources": [str(folder / name)], "tokenizer": str(tmp_path / "tokenizer")}
        assert runner.run(folder / "out", unit_bytes=0, validation="none", **job) == 0
        manifest = json.loads((folder / "out" / "manifest.json").read_text())
        assert manifest["encoder"] == ("gigatoken" if normalizer is None else "tokenizers")
        assert manifest["splits"]["train"]["text_bytes"] == len(own)
        assert manifest["splits"]["train"]["documents"] == 1
        memory.append(int((folder / "out" / ".memory").read_text()))
    assert memory[1] - memory[0] < most * size, memory


def test_a_folder_that_was_deleted_is_prepared_with_the_tokenizer_asked_for(tmp_path):
    texts = write_texts(tmp_path / "text")
    for vocabulary in (300, 280):
        job = Job((str(tmp_path / "text"),), train_tokenizer=vocabulary, validation="none")
        prepare(job, tmp_path / "out", quiet=True)
        written = read_texts(tmp_path / "out", "train")
        assert sorted(written) == sorted(text for text in texts if text.strip())
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("validation", ["first:1e9", "hash:0.999999999"])
def test_validation_that_leaves_nothing_to_train_on_is_refused(tmp_path, validation):
    write_texts(tmp_path / "text")
    job = Job((str(tmp_path / "text"),), train_tokenizer=300, validation=validation)
    with pytest.raises(ValueError, match="leaves no document with text to train on"):
        prepare(job, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out" / "manifest.json").exists()
    # The folder is free for a job that leaves some, and comes to what a new one does.
    job = replace(job, validation="hash:0.2")
    again, new = (prepare(job, tmp_path / name, quiet=True) for name in ("out", "new"))
    assert again["fingerprint"] == new["fingerprint"]


def test_folder_that_cannot_be_written_is_refused(tmp_path):
    write_texts(tmp_path / "text")
    (tmp_path / "file").write_text("in the way")
    job = Job((str(tmp_path / "text"),), train_tokenizer=300)
    with pytest.raises(ValueError, match="data.path=.*cannot be written"):
        prepare(job, tmp_path / "file" / "out", quiet=True)


def test_folder_in_use_by_another_process_is_refused(tmp_path):
    write_texts(tmp_path / "text")
    job = Job((str(tmp_path / "text"),), train_tokenizer=300)
    (tmp_path / "out").mkdir()
    script = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX);"
        "print('locked', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "out" / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(ValueError, match="is in use by another process"):
        prepare(job, tmp_path / "out", quiet=True)
    holder.communicate()
    prepare(job, tmp_path / "out", quiet=True)


@pytest.mark.parametrize(
    "rule",
    ["", "last", "hash:0", "hash:1", "hash:nan", "hash:x", "first", "first:0", "first:-5"]
    + ["first:x", "first:inf", "first:nan", "none:1"],
)
def test_validation_rule_that_is_none_is_refused(rule):
    with pytest.raises(ValueError, match=f"data.validation={rule} must be"):
        Job(("python-stdlib",), train_tokenizer=300, validation=rule)


def test_validation_rules_are_read():
    assert parse_validation("hash") == ("hash", 0.01)
    assert parse_validation("hash:0.25") == ("hash", 0.25)
    assert parse_validation("first:100e6") == ("first", 100_000_000)
    assert parse_validation("none") == ("none", 0)


@pytest.mark.parametrize("both", [{}, {"tokenizer": "folder", "train_tokenizer": 300}])
def test_job_needs_exactly_one_tokenizer(both):
    with pytest.raises(ValueError, match=r"exactly one of data\.tokenizer"):
        Job(("python-stdlib",), **both)


def test_missing_source_is_refused_before_any_file_is_written(tmp_path):
    job = Job((str(tmp_path / "missing.txt"),), train_tokenizer=300)
    with pytest.raises(ValueError, match="no such file"):
        prepare(job, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_folder_is_given_by_its_name_too(tmp_path):
    save_tokenizer(tmp_path / "tokenizer", LARGE)
    (tmp_path / "a.txt").write_text("some text " * 50)
    job = Job([tmp_path / "a.txt"], tokenizer=str(tmp_path / "tokenizer"), validation="none")
    assert job.sources == (str(tmp_path / "a.txt"),)
    prepare(job, str(tmp_path / "out"), quiet=True)
    assert len(open_split(str(tmp_path / "out"), "train")) > 50
    assert verify_folder(str(tmp_path / "out")) == []
    with pytest.raises(ValueError, match="split=test must be "):
        open_split(str(tmp_path / "out"), "test")
    with pytest.raises(ValueError, match="there is no such folder"):
        open_split(str(tmp_path / "nowhere"), "train")


@pytest.mark.parametrize("wrong", ["my_texts", (), []])
def test_a_job_has_one_or_several_sources(wrong):
    with pytest.raises(ValueError, match="must be one or several sources in a tuple or list"):
        Job(wrong, train_tokenizer=300)
    with pytest.raises(ValueError, match="data.max_rejected=-1 must be"):
        Job(("x",), train_tokenizer=300, max_rejected=-1)
    with pytest.raises(ValueError, match=r"data.train_tokenizer=300 \(str\) must be"):
        Job(("x",), train_tokenizer="300")


def test_a_job_takes_paths_and_numbers_of_numpy():
    job = Job((Path("text"),), tokenizer=Path("folder"), max_rejected=np.int64(3))
    assert job == Job(("text",), tokenizer="folder", max_rejected=3)
    assert type(Job(("text",), train_tokenizer=np.int64(300)).train_tokenizer) is int
    with pytest.raises(ValueError, match="data.validation=10000 must be hash.* no folder 10000"):
        Job(("text",), train_tokenizer=300, validation=10000)
