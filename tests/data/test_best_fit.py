"""Best-fit packing: what a plain best-fit decreasing does, on disk, whatever befalls the disk."""

import contextlib
import hashlib
import json
import os
import pickle
import signal
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from multiprocessing import get_context
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain_lib.data.windows import best_fit
from pretrain_lib.data.windows.best_fit import open_plan, pack_best_fit
from pretrain_lib.files.locks import lock_folder

FINGERPRINT = "0123456789abcdef" * 4
SOME = [5, 0, 9, 1, 1, 17, 8, 3, 2, 2, 8, 30, 4]  # lengths of documents
document_lists = st.lists(st.integers(0, 40), min_size=1, max_size=40).filter(any)
group_sizes = st.sampled_from([1, 2, 7, 2**20])


def make(folder, documents, *, length=8, cuts=(), dtype="<u8", group=2**20, name=FINGERPRINT):
    """Open a plan of documents of these lengths, whose ends come in parts split at `cuts`."""
    ends = np.array(list(accumulate(documents)), dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(best_fit, "GROUP_PIECES", group)
        return open_plan(
            lambda: iter(np.split(ends, cuts)),
            sum(documents),
            folder,
            fingerprint=name,
            sequence_length=length,
        )


def windows_of(plan, numbers=None):
    """Return windows, if not said which then all, as lists of `(start, length)`."""
    windows = []
    for window in range(plan.num_windows) if numbers is None else numbers:
        windows.append(plan.pieces(window).tolist())
    return windows


def contents(folder):
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.suffix in (".pieces", ".bins", ".json")
    }


def cut_documents(documents, length):
    """Return the pieces of documents as `(start, length)`, one token at a time."""
    pieces, position = [], 0
    for tokens in documents:
        for i in range(tokens):
            if i % length == 0:
                pieces.append((position, 0))
            start, count = pieces[-1]
            pieces[-1] = (start, count + 1)
            position += 1
    return pieces


def pack_plainly(lengths, capacity):
    """Return the bins of best-fit decreasing, found piece by piece, as lists of indices."""
    bins, rooms = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [(room, b) for b, room in enumerate(rooms) if room >= lengths[i]]
        if not fits:
            fits = [(capacity, len(bins))]
            bins.append([])
            rooms.append(capacity)
        best = min(fits)[1]
        bins[best].append(i)
        rooms[best] -= lengths[i]
    return bins


def split_bins(order, bin_ends):
    return [part.tolist() for part in np.split(order, bin_ends)[:-1]]


@settings(deadline=None, max_examples=300)
@given(data=st.data(), capacity=st.integers(1, 30))
def test_bins_equal_those_of_a_plain_best_fit_decreasing(data, capacity):
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=120))
    order, bin_ends = pack_best_fit(np.array(lengths, dtype=np.uint32), capacity=capacity)
    assert order.dtype == bin_ends.dtype == np.int64
    bins = split_bins(order, bin_ends)
    assert bins == [sorted(indices) for indices in pack_plainly(lengths, capacity)]


@pytest.mark.parametrize("longest", [0.3, 0.6, 1])
@pytest.mark.parametrize("capacity", [25, 60, 1000])
def test_bins_of_many_pieces_equal_the_plain_ones(capacity, longest):
    random = np.random.default_rng(capacity)
    for count in (50, 150, 150, 1500):
        lengths = random.integers(1, int(capacity * longest), count, endpoint=True)
        plain = pack_plainly(lengths.tolist(), capacity)
        bins = split_bins(*pack_best_fit(lengths, capacity=capacity))
        assert bins == [sorted(indices) for indices in plain]


@settings(deadline=None, max_examples=100)
@given(documents=document_lists, length=st.integers(1, 16), group=group_sizes)
def test_windows_equal_a_plain_packing_of_each_group(tmp_path_factory, documents, length, group):
    plan = make(tmp_path_factory.mktemp("plan"), documents, length=length, group=group)
    pieces, expected = cut_documents(documents, length), []
    for first in range(0, len(pieces), group):
        part = pieces[first : first + group]
        for indices in pack_plainly([count for _, count in part], length):
            expected.append([part[i] for i in sorted(indices)])
    assert windows_of(plan) == expected


@settings(deadline=None, max_examples=100)
@given(documents=document_lists, length=st.integers(1, 16), group=group_sizes)
def test_each_token_is_in_one_window_and_each_short_document_in_one_piece(
    tmp_path_factory, documents, length, group
):
    plan = make(tmp_path_factory.mktemp("plan"), documents, length=length, group=group)
    windows = windows_of(plan)
    pieces = [piece for window in windows for piece in window]
    covered = [start + i for start, count in pieces for i in range(count)]
    assert sorted(covered) == list(range(sum(documents)))
    fills = [sum(count for _, count in window) for window in windows]
    assert all(0 < fill <= length for fill in fills)
    short = {(end - n, n) for end, n in zip(accumulate(documents), documents, strict=True)}
    assert {(start, n) for start, n in short if 0 < n <= length} <= set(pieces)

    report = plan.report
    assert plan.sequence_length == report.sequence_length == length
    assert plan.num_windows == report.windows == len(windows)
    assert report.tokens == len(covered)
    assert report.padded_tokens == sum(length - fill for fill in fills)
    assert report.padded_share == report.padded_tokens / (len(windows) * length)
    assert report.documents == sum(n > 0 for n in documents)
    assert report.cut_documents == sum(n > length for n in documents)
    assert report.cut_share == report.cut_documents / report.documents
    assert report.pieces == len(pieces)


@settings(deadline=None, max_examples=50)
@given(documents=document_lists, group=group_sizes, data=st.data())
def test_bytes_do_not_depend_on_how_the_ends_come(tmp_path_factory, documents, group, data):
    whole, parts, unfinished = (tmp_path_factory.mktemp("plan") for _ in range(3))
    make(whole, documents, group=group)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(documents)), max_size=8)))
    make(parts, documents, group=group, cuts=cuts, dtype="<i8")
    assert contents(parts) == contents(whole)
    open_ends = np.array(list(accumulate(documents))[:-1], dtype="<u8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(best_fit, "GROUP_PIECES", group)
        options = {"fingerprint": FINGERPRINT, "sequence_length": 8}
        open_plan(lambda: iter([open_ends]), sum(documents), unfinished, **options)
    assert contents(unfinished) == contents(whole)


def test_documents_of_a_corpus_leave_almost_no_padding(tmp_path):
    draws = np.random.default_rng(0).lognormal(6, 1.2, 20_000)
    plan = make(tmp_path, np.maximum(1, draws.astype(int)).tolist(), length=1024)
    assert plan.report.padded_share < 0.001
    assert 0.1 < plan.report.cut_share < 0.3


def test_memory_does_not_grow_with_the_documents(tmp_path):
    peaks = {}
    for count in (1, 10):
        documents = [3, 700, 40, 1, 90, 2000] * (5000 * count)
        ends = np.cumsum(documents, dtype="<u8")
        parts = np.split(ends, range(5000, len(ends), 5000))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(best_fit, "GROUP_PIECES", 4096)
            tracemalloc.start()
            options = {"fingerprint": FINGERPRINT, "sequence_length": 256}
            open_plan(lambda p=parts: iter(p), int(ends[-1]), tmp_path / str(count), **options)
            peaks[count] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    assert peaks[10] < 1.1 * peaks[1]


def test_one_endless_document_is_cut_within_the_same_memory(tmp_path):
    tracemalloc.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(best_fit, "GROUP_PIECES", 4096)
        options = {"fingerprint": FINGERPRINT, "sequence_length": 256}
        plan = open_plan(lambda: iter([]), 256 * 500_000 - 1, tmp_path, **options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert plan.report.cut_documents == 1
    assert windows_of(plan, [0, 4096, 499_999]) == [
        [(0, 256)],
        [(4096 * 256, 256)],
        [(499_999 * 256, 255)],
    ]
    assert peak < 2 * 2**20  # the pieces alone are 6 MB


def test_a_plan_that_is_there_is_used_as_it_is(tmp_path):
    def stamps():
        stats = {path.name: path.stat() for path in tmp_path.glob("best_fit-*")}
        return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}

    windows = windows_of(make(tmp_path, SOME))
    before = stamps()
    assert len(before) == 3
    with lock_folder(tmp_path, setting="data.path"):  # reading needs no lock
        options = {"fingerprint": FINGERPRINT, "sequence_length": 8}
        plan = open_plan(lambda: pytest.fail("read again"), sum(SOME), tmp_path, **options)
    assert windows_of(plan) == windows
    assert stamps() == before


def test_a_plan_that_another_process_makes_is_waited_for(tmp_path, monkeypatch):
    """The other releases its lock at the first pause."""
    with contextlib.ExitStack() as other:
        other.enter_context(lock_folder(tmp_path, setting="data.path"))
        monkeypatch.setattr(best_fit, "time", SimpleNamespace(sleep=lambda _: other.close()))
        waited = make(tmp_path, SOME)
    assert windows_of(waited) == windows_of(make(tmp_path / "at_once", SOME))


def test_plans_of_other_arrays_and_lengths_lie_side_by_side(tmp_path):
    others = [
        make(tmp_path, SOME, length=8),
        make(tmp_path, SOME, length=9),
        make(tmp_path, SOME[::-1], length=8, name="f" * 64),
    ]
    assert len(contents(tmp_path)) == 9
    assert [windows_of(plan) for plan in others] == [
        windows_of(make(tmp_path / "8", SOME, length=8)),
        windows_of(make(tmp_path / "9", SOME, length=9)),
        windows_of(make(tmp_path / "f", SOME[::-1], length=8)),
    ]


def test_a_plan_of_another_array_by_a_similar_name_is_refused(tmp_path):
    make(tmp_path, SOME)
    with pytest.raises(ValueError, match="-0123456789ab.json.*delete it so that it is built again"):
        make(tmp_path, SOME, name=FINGERPRINT[:12] + "f" * 52)
    with pytest.raises(ValueError, match="-0123456789ab.json.*delete it so that it is built again"):
        make(tmp_path, [*SOME, 1])


@pytest.mark.parametrize("suffix", [".pieces", ".bins", ".json"])
def test_damage_anywhere_is_refused_and_mended_as_the_message_says(tmp_path, suffix):
    make(tmp_path, SOME)
    whole = contents(tmp_path)
    (path,) = tmp_path.glob(f"*{suffix}")
    raw = path.read_bytes()
    flipped = [raw[:i] + bytes([raw[i] ^ 1]) + raw[i + 1 :] for i in range(len(raw))]
    for damaged in [*flipped, raw[:-2], raw[: len(raw) // 2], b"", raw + b"0"]:
        path.write_bytes(damaged)
        with pytest.raises(ValueError) as error:
            make(tmp_path, SOME)
        assert str(error.value).startswith(f"{path}: ")
        assert "delete it so that it is built again" in str(error.value)
    path.unlink()
    make(tmp_path, SOME)
    assert contents(tmp_path) == whole


def build_and_die(folder, fatal_call):
    """Build a plan, but end at a call that makes bytes or names durable."""
    calls = 0

    def dying(function):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == fatal_call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    os.fsync, os.replace = dying(os.fsync), dying(os.replace)
    make(folder, SOME)


def test_killed_at_any_instant_and_called_again_it_comes_to_the_same_bytes(tmp_path):
    make(tmp_path / "whole", SOME)
    whole, survived = contents(tmp_path / "whole"), []
    for fatal_call in range(1, 20):
        folder = tmp_path / str(fatal_call)
        process = get_context("fork").Process(target=build_and_die, args=(folder, fatal_call))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        survived.append(sorted(contents(folder)))
        assert contents(folder).items() <= whole.items()
        make(folder, SOME)
        assert contents(folder) == whole
    assert [len(names) for names in survived] == [0, 0, 0, 0, 1, 2, 2, 3]
    assert contents(folder) == whole


def test_a_plan_travels_to_workers_and_is_read_from_threads(tmp_path):
    documents = np.random.default_rng(0).integers(1, 300, 2000).tolist()
    plan = make(tmp_path, documents, length=256)
    windows = windows_of(plan)
    pickled = pickle.dumps(plan)
    assert len(pickled) < 1000
    copy = pickle.loads(pickled)
    assert copy.report == plan.report
    assert windows_of(copy) == windows
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(windows_of, [plan, copy] * 8):
            assert found == windows


@pytest.mark.parametrize("ends", [[], [0, 0]])
def test_an_array_without_tokens_is_refused(tmp_path, ends):
    options = {"fingerprint": FINGERPRINT, "sequence_length": 8}
    with pytest.raises(ValueError, match="data.packing=best_fit needs documents"):
        open_plan(lambda: iter([np.array(ends, "<u8")]), 0, tmp_path / "plan", **options)
    assert list(tmp_path.iterdir()) == []


def test_the_format_on_disk_is_frozen(tmp_path):
    make(tmp_path, [3, 5, 0, 1], length=4)
    pieces = [(3, 4), (0, 3), (7, 1), (8, 1)]
    raw = b"".join(s.to_bytes(8, "little") + n.to_bytes(4, "little") for s, n in pieces)
    name = "best_fit-T4-0123456789ab"
    assert (tmp_path / f"{name}.pieces").read_bytes() == raw
    assert (tmp_path / f"{name}.bins").read_bytes().hex() == "".join(
        f"{end:02x}00000000000000" for end in (1, 3, 4)
    )
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert {key: value for key, value in record.items() if "sha256" not in key} == {
        "format_version": 1,
        "fingerprint": FINGERPRINT,
        "sequence_length": 4,
        "tokens": 9,
        "documents": 3,
        "cut_documents": 1,
        "pieces": 4,
        "windows": 3,
        "padded_tokens": 3,
    }
    assert record["sha256"] == {
        suffix: hashlib.sha256((tmp_path / f"{name}{suffix}").read_bytes()).hexdigest()
        for suffix in (".pieces", ".bins")
    }
