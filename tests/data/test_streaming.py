"""Streams: the endless shuffled row of a source, by hand; resumes, kills, disk, refusals."""

import contextlib
import copy
import errno
import gc
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from torch.utils.data import DataLoader

from pretrain_lib import (
    GPT2,
    DatasetSource,
    Job,
    StreamingDataset,
    open_corpus,
    open_spool,
    rank_micro_batches,
    start_accelerator,
    train,
    train_tokenizer,
)
from pretrain_lib.checkpoint.state import read_state
from pretrain_lib.config.arguments import parse_recipe
from pretrain_lib.config.units import TokenCount
from pretrain_lib.data.inspection import inspect_data
from pretrain_lib.data.pool import run_tasks
from pretrain_lib.data.prepare import groups, stream_errors
from pretrain_lib.data.prepare.job import open_units
from pretrain_lib.data.prepare.spool import Cursor, _cut, _delete_far_from
from pretrain_lib.data.prepare.stream_errors import raise_error, record_error
from pretrain_lib.data.text import sources
from pretrain_lib.data.text.formats import Document
from pretrain_lib.data.text.tokenizer import load_tokenizer
from pretrain_lib.data.windows.packing import IGNORED_TARGET
from pretrain_lib.wording import plural
from tests.conftest import ROOT, change, forked_launchers, read_rows, run_command, tiny_flags
from tests.data.test_order import plain_keys, plain_permute
from tests.test_recipes import gpt2_124m

pytestmark = pytest.mark.moderate

LENGTH, WINDOWS = 8, 24  # tokens in a window, windows in a segment
SEGMENT = LENGTH * WINDOWS
SEED, HELD_OUT = 5, 100
WORDS = ["ab", "cd", "ef", "gü", "ijk", "lm"]


def write_lines(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=50)) for _ in range(50)]
    train_tokenizer(texts, vocabulary_size=280).save(folder)
    return folder


def write_job(folder, tokenizer_folder):
    """Return a job of five sources, so of five units, of about 1,000 tokens together."""
    draw = random.Random(1)
    for number in range(5):
        texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 30))) for _ in range(9)]
        write_lines(folder / f"{number}.jsonl", [*texts[:4], " \n", *texts[4:]])
    names = tuple(str(path) for path in sorted(folder.iterdir()))
    return Job(names, tokenizer=str(tokenizer_folder), validation=f"first:{HELD_OUT}")


@pytest.fixture
def job(tmp_path, tokenizer_folder):
    return write_job(tmp_path / "text", tokenizer_folder)


def has_text(document):
    whole = isinstance(document, Document) and document.begins and document.ends
    return document.text.strip() if whole else isinstance(document, Document)


def shuffle(items, *names):
    keys = plain_keys(*names)
    return [items[plain_permute(i, len(items), keys)] for i in range(len(items))]


class PlainRow:
    """The row of a stream as it is described: units shuffled in each epoch, documents in a unit."""

    def __init__(self, spool, job):
        self.tokenizer = load_tokenizer(job.tokenizer)
        self.units, missing = [], int((job.validation.split(":") + ["0"])[1])
        for source, unit in open_units(job.open_sources(), cut_text=spool.cuts_text):
            documents, first_is_cut = [], False
            for document in source.documents(unit):
                if not has_text(document):
                    continue
                ids = [self.tokenizer.end_of_text_id] * document.begins
                ids += self.tokenizer.encode(document.text)
                held_out = min(missing, len(ids))
                missing -= held_out
                if ids[held_out:]:
                    first_is_cut |= held_out > 0
                    documents.append((ids[held_out:], len(document.text.encode())))
            self.units.append((documents, first_is_cut))
        self.tokens, self.ends, self.epochs = [], [], 0

    def read(self, count):
        """Return the first `count` tokens, and where documents end in them."""
        while len(self.tokens) < count:
            for unit in shuffle(range(len(self.units)), "units", self.epochs):
                for document in self._shuffled_unit(unit):
                    self.tokens += document
                    self.ends.append(len(self.tokens))
            self.epochs += 1
        return self.tokens[:count], [end for end in self.ends if end <= count]

    def _shuffled_unit(self, unit):
        documents, first_is_cut = self.units[unit]
        parts, filled = [[]], 0
        for ids, size in documents:
            if filled >= groups.GROUP_BYTES:
                parts.append([])
                filled = 0
            parts[-1].append(ids)
            filled += size
        for number, part in enumerate(parts):
            stays = 1 if first_is_cut and number == 0 else 0
            name = f"train-{self.epochs:03d}-{unit:05d}-{number:03d}"
            yield from part[:stays] + shuffle(part[stays:], "documents", name)

    def window(self, k, *, masked=False):
        """Return the k-th window of a stream of this row."""
        segment, slot = divmod(k, WINDOWS)
        place = plain_permute(slot, WINDOWS, plain_keys("segment", SEED, segment))
        start = segment * SEGMENT + place * LENGTH
        tokens, ends = self.read(start + LENGTH + 1)
        inputs, targets = tokens[start:-1], tokens[start + 1 :]
        if not masked:
            return {"input_ids": inputs, "targets": targets}
        here = [end - start for end in ends if start < end <= start + LENGTH]
        targets = [IGNORED_TARGET if i + 1 in here else t for i, t in enumerate(targets)]
        inside = [end for end in here if end < LENGTH]
        filled = inside + [LENGTH] * (LENGTH - len(inside))
        return {"input_ids": inputs, "targets": targets, "document_ends": filled}


def open_small(job, folder):
    return open_spool(job, folder, segment_tokens=SEGMENT, quiet=True)


def read(spool, **options):
    return StreamingDataset(spool, sequence_length=LENGTH, seed=SEED, **{"workers": 1} | options)


def assert_windows(dataset, row, positions):
    batch = dataset.batch(positions)
    for i, k in enumerate(positions):
        expected = row.window(k, masked=dataset.document_masking)
        assert {name: rows[i].tolist() for name, rows in batch.items()} == expected, k


def bins(folder):
    return sorted(int(path.stem.split("-")[1]) for path in folder.glob("segment-*.bin"))


def wait_until(condition):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "this never came about"
        time.sleep(0.01)


def texts_of_files():
    words = st.lists(st.sampled_from(WORDS), max_size=40).map(" ".join)
    lines = st.lists(words | st.just(" \n"), max_size=8)
    return st.lists(lines | st.integers(100, 900), min_size=1, max_size=4)


def write_files(folder, files):
    """Write lists of texts as .jsonl, numbers as one text of so many words."""
    folder.mkdir()
    for number, content in enumerate(files):
        if isinstance(content, int):
            text = " ".join(random.Random(number).choices(WORDS, k=content))
            (folder / f"{number}.txt").write_text(text)
        else:
            write_lines(folder / f"{number}.jsonl", content)


@settings(deadline=None, max_examples=30)
@given(
    files=texts_of_files(),
    held_out=st.sampled_from([0, 1, 40, 400]),
    segment_tokens=st.integers(1, 300),
    group_bytes=st.sampled_from([1, 200, 2**26]),
)
def test_segments_are_the_row_cut_up_from_any_cursor_on(
    tmp_path_factory, tokenizer_folder, files, held_out, segment_tokens, group_bytes
):
    folder = tmp_path_factory.mktemp("row")
    write_files(folder / "text", files)
    (folder / "text" / "blank.txt").write_text(" ")
    validation = f"first:{held_out}" if held_out else "none"
    job = Job((str(folder / "text"),), tokenizer=str(tokenizer_folder), validation=validation)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "UNIT_BYTES", (700, 700))
        patch.setattr(groups, "GROUP_BYTES", group_bytes)
        spool = open_spool(job, folder / "spool", segment_tokens=segment_tokens, quiet=True)
        row = PlainRow(spool, job)
        if not any(documents for documents, _ in row.units):
            with pytest.raises(ValueError, match="leaves no document with text to train on"):
                next(_cut(spool, Cursor(), 1))
            return
        segments, begins = [], [Cursor()]
        while row.epochs < 4 and len(segments) < 100:
            row.read(len(segments) * segment_tokens + 1)
            segments.append(None)
        cut = _cut(spool, Cursor(), 1)
        for number in range(len(segments)):
            ids, ends, after = next(cut)
            tokens, all_ends = row.read((number + 1) * segment_tokens + 1)
            first = number * segment_tokens
            assert ids.tolist() == tokens[first:]
            assert ends.tolist() == [end - first for end in all_ends if end > first]
            segments[number] = ids.tolist(), ends.tolist()
            begins.append(after)
        some = {n for n in range(1, len(segments)) if segment_tokens in segments[n - 1][1]}
        some |= set(random.Random(0).sample(range(len(segments)), min(5, len(segments))))
        for number in sorted(some):  # also those that begin where a document does
            ids, ends, after = next(_cut(spool, begins[number], 1))
            assert (ids.tolist(), ends.tolist()) == segments[number]
            assert after == begins[number + 1]


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "document_masking"])
@pytest.mark.parametrize("workers", [1, 2])
def test_windows_are_those_of_the_row_over_several_epochs(tmp_path, job, workers, masked):
    spool = open_small(job, tmp_path / "spool")
    row = PlainRow(spool, job)
    dataset = read(spool, workers=workers, document_masking=masked)
    for first in range(0, 14 * WINDOWS, 7):
        assert_windows(dataset, row, range(first, first + 7))
    assert row.epochs >= 3
    borders = [segment * SEGMENT for segment in range(1, 14)]
    assert not set(borders) <= set(row.ends)  # documents cross the segments' borders
    dataset.close()


def test_each_token_is_a_target_once(tmp_path, job):
    spool = open_small(job, tmp_path / "spool")
    dataset = read(spool)
    tokens, _ = PlainRow(spool, job).read(9 * SEGMENT + 1)
    targets, inputs = Counter(), Counter()
    for first in range(0, 9 * WINDOWS, WINDOWS):
        batch = dataset.batch(range(first, first + WINDOWS))
        targets.update(batch["targets"].flatten().tolist())
        inputs.update(batch["input_ids"].flatten().tolist())
    assert targets == Counter(tokens[1:])
    assert inputs == Counter(tokens[:-1])
    dataset.close()


@pytest.mark.parametrize("lost", ["nothing", "folder", "folder and cursor"])
def test_a_stream_goes_on_at_any_window_again_and_again(tmp_path, job, lost):
    row = PlainRow(open_small(job, tmp_path / "spool"), job)
    draw, windows, cursor = random.Random(lost), 0, None
    for _ in range(5):
        spool = open_small(job, tmp_path / "spool")
        dataset = read(spool, first_window=windows, cursor=cursor, document_masking=True)
        count = draw.randint(1, 3 * WINDOWS)
        assert_windows(dataset, row, range(windows, windows + count))
        windows += count
        cursor = None if lost == "folder and cursor" else dataset.cursor(windows)
        dataset.close()
        if lost != "nothing":
            shutil.rmtree(tmp_path / "spool")


def test_two_workers_go_on_where_one_stopped(tmp_path, job):
    spool = open_small(job, tmp_path / "spool")
    row = PlainRow(spool, job)
    for first, workers in ((0, 1), (131, 2), (260, 1)):
        dataset = read(spool, first_window=first, workers=workers)
        assert_windows(dataset, row, range(first, first + 131))
        dataset.close()


def test_a_cursor_is_used_for_the_segments_it_is_of_and_those_behind_it(tmp_path, job):
    spool = open_small(job, tmp_path / "spool")
    row = PlainRow(spool, job)
    dataset = read(spool)
    dataset.batch(range(0, 12 * WINDOWS, 10))
    cursors = [dataset.cursor(segment * WINDOWS) for segment in range(12)]
    dataset.close()
    for of, first in ((4, 4), (4, 7), (9, 4)):  # loaders that read ahead know of later ones
        shutil.rmtree(tmp_path / "spool")
        spool = open_small(job, tmp_path / "spool")
        dataset = read(spool, first_window=first * WINDOWS, cursor=cursors[of])
        assert_windows(dataset, row, range(first * WINDOWS, (first + 2) * WINDOWS))
        known = {int(path.stem.split("-")[1]) for path in spool.folder.glob("cursor-*.json")}
        assert (of in known) == (of <= first)
        dataset.close()
    shutil.rmtree(tmp_path / "spool")
    spool = open_small(job, tmp_path / "spool")
    # Of an untrue one the windows are those that lie where it says: it spares reading the rest.
    untrue = {"segment": 3, "begins": cursors[8]["begins"]}
    dataset = read(spool, first_window=3 * WINDOWS, cursor=untrue)
    tokens, _ = row.read(9 * SEGMENT + 1)
    batch = dataset.batch(range(3 * WINDOWS, 4 * WINDOWS))
    assert Counter(batch["targets"].flatten().tolist()) == Counter(tokens[8 * SEGMENT + 1 :])
    dataset.close()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_micro_batches_are_the_same_tensors_on_any_number_of_ranks(tmp_path, job, world_size):
    spool = open_small(job, tmp_path / "spool")
    row = PlainRow(spool, job)
    # One process fills the spool, the others read what it writes.
    ranks = [read(spool, produces=rank == 0, document_masking=True) for rank in range(world_size)]
    for first in range(0, 6 * WINDOWS, 16):
        for rank, dataset in enumerate(ranks):
            batches = rank_micro_batches(
                dataset, first, 16, micro_batch=2, rank=rank, world_size=world_size
            )
            numbers = range(first + 2 * rank, first + 16, 2 * world_size)
            assert len(batches) == len(numbers)
            for batch, number in zip(batches, numbers, strict=True):
                expected = [row.window(k, masked=True) for k in (number, number + 1)]
                for name, rows in batch.items():
                    assert rows.tolist() == [window[name] for window in expected]
    ranks[0].close()


def test_a_few_segments_lie_on_disk_however_far_it_is_read(tmp_path, job):
    spool = open_small(job, tmp_path / "spool")
    dataset, most = read(spool), 0
    for first in range(0, 30 * WINDOWS, 4):
        dataset.batch(range(first, first + 4))
        most = max(most, len(bins(spool.folder)))
    assert most <= 4
    wait_until(lambda: bins(spool.folder) == [28, 29, 30, 31])
    dataset.close()


@pytest.mark.parametrize("by", ["state", "batch"])
def test_segments_that_were_deleted_are_made_again_on_going_back(tmp_path, job, by):
    spool = open_small(job, tmp_path / "spool")
    row, dataset = PlainRow(spool, job), read(spool)
    for segment in (9, 8, 4, 5, 6, 3, 0, 1, 9):
        first = segment * WINDOWS + 5
        if by == "state":
            dataset.load_state_dict({"windows": first})
        assert_windows(dataset, row, range(first, first + WINDOWS // 2))
        assert len(bins(spool.folder)) <= 4
    for segment in (10, 11):
        dataset.batch([segment * WINDOWS])
    wait_until(lambda: bins(spool.folder) == [10, 11, 12, 13])
    if by == "state":
        dataset.load_state_dict({"windows": 9 * WINDOWS})
    assert_windows(dataset, row, [9 * WINDOWS])  # which was open when it was deleted
    dataset.close()


def test_one_batch_may_reach_over_many_segments(tmp_path, job):
    spool = open_small(job, tmp_path / "spool")
    row, dataset = PlainRow(spool, job), read(spool)
    assert_windows(dataset, row, range(3, 9 * WINDOWS, 10))
    assert_windows(dataset, row, [7 * WINDOWS, 3, 5 * WINDOWS])
    with pytest.raises(IndexError, match="window -1"):
        dataset.batch([4, -1])
    dataset.close()


def test_what_a_kill_left_of_a_segment_is_deleted(tmp_path, job):
    spool = open_small(job, tmp_path / "spool")
    for name in ("segment-00000000.bin", "segment-00000001.ends.npy", "segment-00000002.bin.tmp"):
        (spool.folder / name).write_bytes(b"some")
    dataset = read(spool, first_window=9 * WINDOWS)
    dataset.batch([9 * WINDOWS])
    assert not [path for path in spool.folder.glob("segment-*") if int(path.name[8:16]) < 8]
    dataset.close()


def test_a_source_that_has_changed_is_refused_and_not_trained_on(tmp_path, job):
    spool = open_small(job, tmp_path / "spool")
    dataset = read(spool)
    dataset.batch([8 * WINDOWS])
    dataset.close()
    contents = {Path(name): Path(name).read_text() for name in job.sources}
    for path, content in contents.items():
        path.write_text(content.replace("ab", "cd"))  # of the same size
    spool = open_small(job, tmp_path / "spool")
    for _ in range(2):  # it stays refused
        dataset = read(spool)
        with pytest.raises(ValueError, match=r"3.jsonl.* has changed: its segment 0 is not what"):
            dataset.batch([0])
        dataset.close()
        assert not spool.has_segment(0)
    for path, content in contents.items():
        path.write_text(content)
    dataset = read(spool)
    assert_windows(dataset, PlainRow(spool, job), range(20))
    dataset.close()
    path.write_text(content + content)
    with pytest.raises(ValueError, match="prepared differently .the text of .* has changed since"):
        open_small(job, tmp_path / "spool")


def test_a_damaged_byte_is_named(tmp_path, job):
    spool = open_small(job, tmp_path / "spool")
    dataset = read(spool)
    dataset.batch([0])
    wait_until(lambda: spool.has_segment(2))
    dataset.close()
    path = spool.folder / "segment-00000001.bin"
    raw = bytearray(path.read_bytes())
    raw[SEGMENT // 2] ^= 1
    path.write_bytes(raw)
    dataset = read(spool)
    assert_windows(dataset, PlainRow(spool, job), range(WINDOWS))
    with pytest.raises(ValueError, match="segment-00000001.bin, block 0"):
        dataset.batch(range(WINDOWS, 2 * WINDOWS))
    dataset.close()


def test_a_stream_that_is_dropped_lets_its_folder_go(tmp_path, job):
    spool = open_small(job, tmp_path / "spool")
    row, first = PlainRow(spool, job), read(spool)
    first.batch([0])
    second = read(spool)
    with pytest.raises(ValueError, match="spool is in use by another process"):
        second.batch([9 * WINDOWS])
    assert_windows(first, row, range(9 * WINDOWS))  # which the other's failure does not touch
    del first
    second.load_state_dict({"windows": 7})
    assert_windows(second, row, range(7, 9 * WINDOWS))
    second.close()


def test_a_producer_that_is_killed_while_it_is_waited_for_is_said_to_be(tmp_path, job):
    spool = open_small(job, tmp_path / "spool")
    dataset = read(spool)
    dataset.batch([0])
    (producer,) = active_children()
    os.kill(producer.pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as reader:
        pending = reader.submit(dataset.batch, [9 * WINDOWS])
        time.sleep(0.2)
        assert not pending.done()
        producer.kill()
        with pytest.raises(RuntimeError, match="that fills .*spool ended .*If it ran out"):
            pending.result()
    dataset.load_state_dict({"windows": 5})
    assert_windows(dataset, PlainRow(spool, job), range(5, 5 * WINDOWS))
    dataset.close()


def test_signals_to_a_whole_group_leave_the_producer_at_work(tmp_path, job):
    spool = open_small(job, tmp_path / "spool")
    dataset = read(spool)
    dataset.batch([0])
    (producer,) = active_children()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(producer.pid, number)
    assert_windows(dataset, PlainRow(spool, job), range(0, 12 * WINDOWS, 5))
    assert active_children() == [producer]
    dataset.close()
    assert active_children() == []


def test_a_producer_that_starts_late_leaves_what_is_being_read(job, tmp_path):
    spool = open_small(job, tmp_path / "spool")
    dataset = read(spool)
    for segment in (4, 5):
        dataset.batch([segment * WINDOWS])
    wait_until(lambda: spool.has_segment(7))
    dataset.close()
    resumed = read(spool, first_window=5 * WINDOWS - 1)  # from a checkpoint before that step
    resumed._start_producer = lambda: None
    windows = resumed.batch(range(5 * WINDOWS - 1, 8 * WINDOWS))  # of what the spool holds already
    _delete_far_from(spool, 4)  # what its producer does first
    assert bins(spool.folder) == [4, 5, 6, 7]
    again = resumed.batch(range(5 * WINDOWS - 1, 8 * WINDOWS))
    assert all(torch.equal(windows[name], again[name]) for name in windows)


def log_windows(folder, tokenizer_folder, workers, total):
    """Write the windows of a stream to a log, from the one on that it does not hold yet."""
    folder = Path(folder)
    spool = open_small(write_job(folder / "text", tokenizer_folder), folder / "spool")
    with (folder / "log").open("a+") as log:
        log.seek(0)
        first = len(log.readlines())
        for k, window in enumerate(read(spool, workers=workers, first_window=first), start=first):
            if k == total:
                break
            log.write(f"{k} {window['input_ids'].tolist()}\n")
            log.flush()


def running_of(session):
    """Return the processes of a session that are alive."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, number = path.read_text().rpartition(")")[2].split()[:4]
            found += [int(path.parent.name)] if int(number) == session and state != "Z" else []
    return found


@pytest.mark.slow
def test_killed_at_any_instant_it_leaves_no_process_and_goes_on(tmp_path, job, tokenizer_folder):
    log, total, draw = tmp_path / "log", 40 * WINDOWS, random.Random(3)
    for workers, until in ((2, 150), (1, 320), (1, 600), (1, None)):
        arguments = (str(tmp_path), str(tokenizer_folder), workers, total)
        code = f"from tests.data.test_streaming import log_windows; log_windows(*{arguments})"
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True)
        if until:
            wait_until(lambda n=until: log.exists() and len(log.read_text().splitlines()) >= n)
            time.sleep(draw.random() / 10)
            assert len(running_of(process.pid)) >= 2 + workers
            process.kill()
        assert process.wait() == (-signal.SIGKILL if until else 0)
        wait_until(lambda session=process.pid: not running_of(session))
    row = PlainRow(open_small(job, tmp_path / "spool"), job)
    expected = [f"{k} {row.window(k)['input_ids']}" for k in range(total)]
    assert log.read_text().splitlines() == expected


def test_sources_without_text_are_refused(tmp_path, tokenizer_folder):
    write_lines(tmp_path / "blank.jsonl", ["", "  ", "\n"])
    parquet.ParquetWriter(tmp_path / "none.parquet", pa.schema({"text": pa.string()})).close()
    for name in ("blank.jsonl", "none.parquet"):
        job = Job((str(tmp_path / name),), tokenizer=str(tokenizer_folder), validation="none")
        dataset = read(open_small(job, tmp_path / f"spool-{name}"))
        with pytest.raises(ValueError, match=f"{name} leaves no document with text to train on"):
            dataset.batch([0])
        dataset.close()


def test_documents_that_cannot_be_read_are_counted_once_in_each_epoch(tmp_path, job):
    with Path(job.sources[2]).open("a") as file:
        file.write("broken\n" * 3)
    spool = open_small(replace(job, max_rejected=3), tmp_path / "spool")
    dataset = read(spool)
    row = PlainRow(spool, job)
    assert_windows(dataset, row, range(0, 20 * WINDOWS, 9))
    assert row.epochs > 3
    dataset.close()
    left_out = json.loads((tmp_path / "spool" / "manifest.json").read_text())["left_out"]
    (entry,) = left_out["reasons"]
    assert (left_out["rejected"], entry["documents"]) == (3, 3)
    assert entry["reason"] == "not a JSON object in UTF-8"
    assert Path(job.sources[2]).name in entry["first"]
    strict = read(open_small(replace(job, max_rejected=2), tmp_path / "strict"))
    with pytest.raises(
        ValueError, match="3 documents could not be read, more than data.max_rejected=2"
    ):
        strict.batch([0])
    # What was refused may be tried again once it is mended.
    path = Path(job.sources[2])
    path.write_text(path.read_text().replace("broken\n" * 3, " " * 21))
    strict.load_state_dict({"windows": 0})
    assert_windows(strict, row, range(10))
    strict.close()


def test_what_goes_wrong_in_the_producer_keeps_its_traceback(tmp_path, job):
    spool = open_small(job, tmp_path / "spool")
    (spool.folder / "units.tmp").write_text("in the way")
    dataset = read(spool)
    with pytest.raises(RuntimeError, match=r"producer failed: Traceback(.|\n)*FileExistsError"):
        dataset.batch([0])
    dataset.close()


def test_another_job_in_the_folder_is_refused_unless_nothing_is_in_it(tmp_path, job):
    train_tokenizer(["other text"], vocabulary_size=260).save(tmp_path / "other")
    job = replace(job, validation="none")
    other = replace(job, tokenizer=str(tmp_path / "other"))
    spool = open_small(other, tmp_path / "spool")
    spool = open_small(job, tmp_path / "spool")  # nothing was written yet
    dataset = read(spool)
    assert_windows(dataset, PlainRow(spool, job), range(40))
    dataset.close()
    with pytest.raises(ValueError, match="was prepared differently.*tokenizer"):
        open_small(other, tmp_path / "spool")
    with pytest.raises(ValueError, match="was prepared differently.*segment_tokens: 192 there"):
        open_spool(job, tmp_path / "spool", segment_tokens=2 * SEGMENT, quiet=True)


def test_text_cannot_be_held_out_by_its_hash(tmp_path, job):
    with pytest.raises(ValueError, match="data.validation=hash:0.1 needs the whole source"):
        open_small(replace(job, validation="hash:0.1"), tmp_path / "spool")
    assert not (tmp_path / "spool").exists()


def open_often(task):
    job, folder = task
    return [open_small(job, folder).held_out for _ in range(20)]


@pytest.mark.slow
def test_all_processes_of_a_machine_may_open_a_spool_at_once(tmp_path, job):
    expected = open_small(job, tmp_path / "spool").held_out
    assert sum(held.documents for held in expected.values())
    tasks = [(job, tmp_path / "spool")] * 6
    for found in run_tasks(open_often, tasks, workers=6):
        assert found == [expected] * 20


def test_workers_of_a_dataloader_are_refused(tmp_path, job):
    dataset = read(open_small(job, tmp_path / "spool"))
    with pytest.raises(ValueError, match="give the DataLoader num_workers=0"):
        next(iter(DataLoader(dataset, num_workers=2)))


@pytest.mark.slow
def test_rows_of_datasets_are_streamed(tmp_path, tokenizer_folder):
    from datasets import Dataset

    draw = random.Random(4)
    texts = [" ".join(draw.choices(WORDS, k=20)) for _ in range(60)]
    rows = Dataset.from_dict({"text": texts}).to_iterable_dataset(num_shards=4)
    source = DatasetSource(rows, "rows")
    job = Job((source,), tokenizer=str(tokenizer_folder), validation="first:50")
    spool = open_small(job, tmp_path / "spool")
    row = PlainRow(spool, job)
    assert len(row.units) == 4
    dataset = read(spool, first_window=20 * WINDOWS + 3)
    assert_windows(dataset, row, range(20 * WINDOWS + 3, 23 * WINDOWS))
    dataset.close()


@pytest.fixture
def one_thread():
    """Compute on one thread: with several, a model so small mostly waits where others work too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def is_due(row):
    return row["kind"] == "train" or row["step"] % 4 == 0


def run(config):
    corpus = open_corpus(config)
    model = GPT2(config.model).initialize(config.run.seed)
    train(config, model, corpus, start_accelerator(config))


@pytest.fixture
def streamed(recipe, prepared, tmp_path, monkeypatch, one_thread):
    """A run of 20 steps over 5 segments, in fp32."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    names = [str(tmp_path / "text" / f"{number}.jsonl") for number in range(4)]
    draw = random.Random(2)
    for name in names:
        texts = ["def " + " ".join(draw.choices(WORDS, k=60)) for _ in range(9)]
        write_lines(Path(name), texts)
    data = {"source": names, "path": None, "streaming": True, "tokenizer": f"{prepared}/tokenizer"}
    data |= {"spool_tokens": TokenCount(1024), "validation": "first:600", "workers": 1}
    data |= {"document_masking": True}
    return change(recipe, data=data, schedule={"tokens": TokenCount(20 * 256)})


@pytest.mark.slow
def test_a_run_stopped_and_resumed_is_bit_equal_with_its_spool_and_without(streamed, tmp_path):
    run(streamed)
    again = change(streamed, run={"dir": str(tmp_path / "again")})
    run(change(again, run={"max_steps": 3}))
    run(change(again, run={"max_steps": 13}))
    shutil.rmtree(tmp_path / "again" / "spool")
    run(again)
    rows = read_rows(streamed.run.dir)
    assert [row for row in rows if is_due(row)] == rows
    # Where it stopped it validated too.
    assert [row for row in read_rows(again.run.dir) if is_due(row)] == rows


@pytest.mark.slow
def test_a_fork_whose_sequences_divide_the_spool_otherwise_goes_on_in_the_stream(
    streamed, tmp_path, capsys
):
    """Of 1,040 tokens, a segment has 1,024 for sequences of 32, and all for those of 16."""
    streamed = change(streamed, data={"spool_tokens": TokenCount(1040)})
    short = change(streamed, batch={"sequence_length": 16})
    run(change(short, run={"dir": str(tmp_path / "whole")}))
    run(change(streamed, run={"max_steps": 13}))
    capsys.readouterr()
    own = {"dir": str(tmp_path / "fork"), "resume": streamed.run.dir}
    run(change(short, run=own))
    assert "changed since the checkpoint: data was" not in capsys.readouterr().out
    path = "checkpoints/step-00000020"
    whole, fork = (read_state(tmp_path / name / path)[0] for name in ("whole", "fork"))
    assert fork.windows == whole.windows == 20 * 256 // 16
    assert fork.stream == whole.stream and fork.stream["segment"] == 20 * 256 // 1040


@pytest.mark.slow
def test_a_run_begun_by_two_processes_ends_on_one(streamed, prepared, tmp_path):
    configs = []
    for name in ("whole", "moved"):
        flags = tiny_flags(prepared, tmp_path / name)[2:]
        flags += ["--data.source", json.dumps(streamed.data.source), "--data.streaming", "true"]
        flags += ["--data.tokenizer", streamed.data.tokenizer, "--data.spool_tokens", "1024"]
        flags += ["--data.validation", "first:600", "--data.document_masking", "true"]
        flags += ["--schedule.tokens", "5120"]
        configs.append(parse_recipe(gpt2_124m.RECIPE, arguments=flags)[0])
    run(configs[0])
    file = "accelerate_configs/cpu_2proc.yaml"
    command = ["accelerate", "launch", "--config_file", file, "--mixed_precision", "no"]
    command += ["recipes/gpt2_124m.py", *flags, "--run.max_steps", "9"]
    begun = run_command(*command, environment={"OMP_NUM_THREADS": "1", **forked_launchers()})
    assert begun.returncode == 0, begun.stderr
    run(configs[1])
    rows = [[r for r in read_rows(c.run.dir) if r["kind"] == "train"] for c in configs]
    assert [row["step"] for row in rows[1]] == list(range(1, 21))
    for one, moved in zip(*rows, strict=True):
        assert one["loss"] == pytest.approx(moved["loss"], abs=1e-5)
        assert one["targets"] == moved["targets"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("can_be_told", [True, False])
def test_an_error_of_the_disk_in_the_producer_is_one_in_the_run(
    tmp_path, monkeypatch, number, can_be_told
):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    error = OSError(number, os.strerror(number))
    if can_be_told:
        record_error(tmp_path, error)
        ended = {"process": os.getpid(), "exit_code": 0}
    else:
        monkeypatch.setattr(stream_errors, "write_json", refuse)
        with pytest.raises(SystemExit) as end:
            record_error(tmp_path, error)
        ended = {"process": os.getpid(), "exit_code": end.value.code}
    with pytest.raises(OSError, match="the stream's producer failed") as raised:
        raise_error(tmp_path, **ended)
    assert raised.value.errno == number


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (
            {"sequence_length": 100},
            "sequence_length=100 does not divide segment_tokens=192 .*=200",
        ),
        ({"sequence_length": 0}, "sequence_length=0 must be a whole number of at least 1"),
        ({"seed": -1}, "seed=-1 must be a whole number of at least 0"),
        ({"document_masking": "yes"}, "document_masking=yes must be true or false"),
        ({"first_window": 1.5}, "first_window=1.5 must be a whole number"),
        ({"workers": 0}, "workers=0 must be a whole number of at least 1"),
    ],
)
def test_a_stream_refuses_arguments_of_a_wrong_kind(tmp_path, job, options, named):
    spool = open_small(job, tmp_path / "spool")
    with pytest.raises(ValueError, match=named):
        StreamingDataset(spool, **{"sequence_length": LENGTH} | options)
    with pytest.raises(ValueError, match="spool=runs/spool must be what .*open_spool returns"):
        StreamingDataset("runs/spool", sequence_length=LENGTH)
    with pytest.raises(ValueError, match="segment_tokens=0 must be a whole number of at least 1"):
        open_spool(job, tmp_path / "other", segment_tokens=0)
    assert not (tmp_path / "other").exists()


@pytest.mark.filterwarnings("error")
def test_a_stream_that_was_not_made_is_discarded_without_a_word():
    with pytest.raises(TypeError, match="sequence_length"):
        StreamingDataset(None)
    gc.collect()


def test_a_stream_is_not_copied(tmp_path, job):
    spool = open_spool(job, str(tmp_path / "spool"), segment_tokens=np.int64(SEGMENT), quiet=True)
    assert spool == open_small(job, tmp_path / "spool")
    dataset = read(spool)
    for make in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be copied or pickled: make another"):
            make(dataset)
    with pytest.raises(ValueError, match="must be whole numbers"):
        dataset.batch([1.5])
    dataset.close()


def test_a_spool_is_described_but_not_read_as_a_prepared_folder(tmp_path, job, recipe):
    spool = open_small(job, tmp_path / "spool")
    dataset = read(spool)
    dataset.batch([WINDOWS])
    dataset.close()
    segments = len(list(spool.folder.glob("segment-*.json")))
    described = list(inspect_data([spool.folder], sequence_length=LENGTH, window=0))
    assert described[-1].startswith(
        f"spool       {plural(segments, 'segment')} of {SEGMENT} tokens"
    )
    assert any(line.startswith(f"validation  {HELD_OUT} tokens") for line in described)
    with pytest.raises(ValueError, match="is the spool of a stream, .* give a prepared folder"):
        open_corpus(change(recipe, data={"path": str(spool.folder)}))
