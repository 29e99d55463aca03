"""Prepare: bytes that depend on the job alone, restarts after kills, splits that never overlap."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pretrain_lib.data import sources
from pretrain_lib.data.arrays import open_split
from pretrain_lib.data.holdout import parse_validation
from pretrain_lib.data.job import Job
from pretrain_lib.data.prepare import prepare
from pretrain_lib.data.shards import verify_folder
from pretrain_lib.data.tokenizer import load_tokenizer, train_tokenizer

RUN = """
import os, signal, sys
from pathlib import Path
from pretrain_lib.data import sources
from pretrain_lib.data.job import Job
from pretrain_lib.data.prepare import prepare

name, folder, fatal_sync, unit_bytes, workers = sys.argv[1:]
if unit_bytes != "0":
    sources.UNIT_BYTES = (int(unit_bytes), int(unit_bytes))
count, sync = 0, os.fsync

def sync_or_die(descriptor):
    global count
    count += 1
    if count == int(fatal_sync):
        os.kill(os.getpid(), signal.SIGKILL)
    sync(descriptor)

if __name__ == "__main__":
    os.fsync = sync_or_die
    job = Job((name,), train_tokenizer=300, validation="hash:0.2")
    prepare(job, Path(folder), workers=int(workers))
"""


def start(tmp_path, name, folder, *, fatal_sync=0, unit_bytes=3000, workers=1):
    (tmp_path / "run.py").write_text(RUN)
    arguments = [str(a) for a in (name, folder, fatal_sync, unit_bytes, workers)]
    return subprocess.Popen([sys.executable, str(tmp_path / "run.py"), *arguments])


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".") and path.suffix != ".tmp"
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


def read_documents(folder, split):
    """Return the ids of each document, in the order of the shards."""
    documents = []
    for path in sorted(folder.glob(f"{split}-*.bin")):
        ids = np.fromfile(path, dtype="<u2").tolist()
        ends = np.load(path.with_suffix(".ends.npy"), allow_pickle=False).tolist()
        documents += [ids[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    return documents


def read_texts(folder, split):
    tokenizer, documents = load_tokenizer(folder / "tokenizer"), read_documents(folder, split)
    assert {ids[0] for ids in documents} <= {tokenizer.end_of_text_id}
    return [tokenizer.decode(ids[1:]) for ids in documents]


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", (1500, 1500))


def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path):
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=5)) for _ in range(500)]
    paragraphs = [" ".join(draw.choices(words, k=60)) for _ in range(50)]
    (tmp_path / "text").mkdir()
    for name in "ab":  # each is more than one unit of the real size
        with (tmp_path / "text" / f"{name}.jsonl").open("w") as file:
            for number in range(250):
                text = f"{name}{number} " + " ".join(draw.choices(paragraphs, k=50))
                file.write(json.dumps({"text": text}) + "\n")
    train_tokenizer(paragraphs, vocabulary_size=600).save(tmp_path / "tokenizer")
    job = Job((str(tmp_path / "text"),), tokenizer=str(tmp_path / "tokenizer"))
    one = prepare(job, tmp_path / "one", workers=1, quiet=True)
    prepare(job, tmp_path / "two", workers=2, quiet=True)
    assert len(one["splits"]["train"]["shards"]) >= 2
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert verify_folder(tmp_path / "one") == []


@pytest.mark.parametrize("fatal_sync", [1, 3, 9, 14, 15, 27])
def test_killed_at_any_write_and_run_again_gives_the_same_bytes(tmp_path, monkeypatch, fatal_sync):
    monkeypatch.setattr(sources, "UNIT_BYTES", (3000, 3000))
    write_texts(tmp_path / "text")
    job = Job((str(tmp_path / "text"),), train_tokenizer=300, validation="hash:0.2")
    manifest = prepare(job, tmp_path / "whole", quiet=True)
    assert len(manifest["splits"]["train"]["shards"]) >= 2
    killed = start(tmp_path, tmp_path / "text", tmp_path / "killed", fatal_sync=fatal_sync)
    assert killed.wait() == -signal.SIGKILL
    with pytest.raises(ValueError, match="prepare.*did not finish"):
        open_split(tmp_path / "killed", "train")
    prepare(job, tmp_path / "killed", quiet=True)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_killed_again_and_again_still_comes_to_the_same_end(tmp_path, small_units):
    write_texts(tmp_path / "text")
    job = Job((str(tmp_path / "text"),), train_tokenizer=300, validation="hash:0.2")
    manifest = prepare(job, tmp_path / "whole", quiet=True)
    ends = []
    for _ in range(len(manifest["splits"]["train"]["shards"]) + 2):
        run = start(tmp_path, tmp_path / "text", tmp_path / "out", fatal_sync=19, unit_bytes=1500)
        ends.append(run.wait())
        if ends[-1] == 0:
            break
    assert len(ends) > 2
    assert ends == [-signal.SIGKILL] * (len(ends) - 1) + [0]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_workers_end_with_the_process_that_was_killed(tmp_path):
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"{i} " + f"{i % 10} " * 3000}) + "\n" for i in range(1500))
    )
    run = start(tmp_path, tmp_path / "text.jsonl", tmp_path / "out", unit_bytes=0, workers=2)
    while not (tmp_path / "out" / "train-00000.json").is_file():
        assert run.poll() is None
        time.sleep(0.005)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text()
    workers = [int(pid) for pid in children.split()]
    assert len(workers) >= 2
    run.kill()
    run.wait()
    deadline = time.monotonic() + 5
    while (alive := [pid for pid in workers if _runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    assert alive == []


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_kill_while_the_tokenizer_is_written_does_not_spoil_the_folder(tmp_path):
    write_texts(tmp_path / "text")
    job = Job((str(tmp_path / "text"),), train_tokenizer=300, validation="none")
    prepare(job, tmp_path / "whole", quiet=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        folder = tmp_path / f"cut {name}" / "tokenizer.tmp"  # renamed once it is whole
        folder.mkdir(parents=True)
        whole = contents(tmp_path / "whole" / "tokenizer")
        for other, content in whole.items():
            if other <= name:  # the order in which they are written
                (folder / other).write_bytes(content if other != name else content[:20])
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
        ("other", 300, "hash", "sources"),
        ("text", 301, "hash", "tokenizer: trained, 300 ids there, trained, 301 ids asked for"),
        ("text", 300, "none", "validation: hash there, none asked for"),
    ):
        job = Job((str(tmp_path / source),), train_tokenizer=vocabulary, validation=validation)
        with pytest.raises(ValueError, match=f"prepared differently .*{named}"):
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


@pytest.mark.parametrize("amount", [1, 2, 200, 1500])
def test_first_validation_is_exactly_the_first_tokens_of_the_source(tmp_path, small_units, amount):
    texts = [text for text in write_texts(tmp_path / "text") if text.strip()]
    job = Job((str(tmp_path / "text"),), train_tokenizer=300, validation=f"first:{amount}")
    prepare(job, tmp_path / "out", quiet=True)
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
    held_out, remaining, missing = [], [], amount
    for text in texts:
        ids = [tokenizer.end_of_text_id, *tokenizer.encode(text)]
        held_out += [ids[:missing]] if missing else []
        remaining += [ids[missing:]] if ids[missing:] else []
        missing -= min(missing, len(ids))
    assert sum(map(len, held_out)) == amount
    assert [ids for ids in read_documents(tmp_path / "out", "validation") if ids] == held_out
    assert sorted(read_documents(tmp_path / "out", "train")) == sorted(remaining)


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


def test_several_sources_are_prepared_together(tmp_path):
    one, two = write_texts(tmp_path / "one", seed=1), write_texts(tmp_path / "two", seed=2)
    job = Job(
        (str(tmp_path / "one"), str(tmp_path / "two")), train_tokenizer=300, validation="none"
    )
    manifest = prepare(job, tmp_path / "out", quiet=True)
    assert manifest["sources"] == list(job.sources)
    expected = [text for text in one + two if text.strip()]
    assert sorted(read_texts(tmp_path / "out", "train")) == sorted(expected)


@pytest.mark.parametrize("validation", ["first:1e9", "hash:0.999999999"])
def test_validation_that_leaves_nothing_to_train_on_is_refused(tmp_path, validation):
    write_texts(tmp_path / "text")
    job = Job((str(tmp_path / "text"),), train_tokenizer=300, validation=validation)
    with pytest.raises(ValueError, match="leaves no document with text to train on"):
        prepare(job, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out" / "manifest.json").exists()


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
    with pytest.raises(ValueError, match="exactly one of tokenizer"):
        Job(("python-stdlib",), **both)


def test_missing_source_is_refused_before_any_file_is_written(tmp_path):
    job = Job((str(tmp_path / "missing.txt"),), train_tokenizer=300)
    with pytest.raises(ValueError, match="no such file"):
        prepare(job, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()
