"""Tokenize a stream ahead of training into a bounded number of shards, the spool.

The documents of a source, unit after unit and epoch after epoch, form one endless stream of tokens.
It is split into segments of equal size, each a shard whose content depends only on the job and the
segment size. A few segments are written ahead of training and consumed ones are deleted. A cursor
for each segment records where in the source it begins, so that it can be produced again.
"""

import hashlib
import itertools
import json
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pretrain_lib.data.permutation import derive_keys, permute
from pretrain_lib.data.pool import end_with_parent, run_tasks, show_progress
from pretrain_lib.data.prepare.groups import UnitTask, encode_group, gather_groups
from pretrain_lib.data.prepare.holdout import HeldOut, parse_validation, write_first_tokens
from pretrain_lib.data.prepare.job import (
    JOB,
    TOKENIZER_FOLDER,
    Job,
    check_same_job,
    find_encoder,
    open_units,
    write_tokenizer,
)
from pretrain_lib.data.prepare.left_out import Report, report_skipped
from pretrain_lib.data.prepare.manifest import summarize, update_left_out, write_manifest
from pretrain_lib.data.prepare.stream_errors import ERROR, record_error
from pretrain_lib.data.prepare.target import check_target
from pretrain_lib.data.tokens.manifests import REMEDY
from pretrain_lib.data.tokens.shards import MANIFEST, write_shard
from pretrain_lib.files.locks import lock_folder
from pretrain_lib.files.reading import interpreting, read_object
from pretrain_lib.files.writes import write_json
from pretrain_lib.values import check_value

SEGMENTS_AHEAD, SEGMENTS_BEHIND = 2, 1  # kept on disk, relative to the segment being read
POLL_SECONDS = 0.05
END_SIGNAL = signal.SIGUSR2
SETTINGS, UNITS = "spool.json", "units.tmp"


@dataclass(frozen=True)
class Cursor:
    """A position in the endless stream of tokens."""

    epoch: int = 0
    unit: int = 0  # index in the epoch's order
    group: int = 0  # index in the unit
    tokens: int = 0  # index in the group


@dataclass(frozen=True)
class Spool:
    """A spool folder and the settings that determine its content."""

    job: Job
    folder: Path
    package: str
    cuts_text: bool
    held_out: dict[int, HeldOut]
    segment_tokens: int
    """Tokens per segment, not counting the first token of the next one, which it holds too."""

    def segment_name(self, segment: int) -> str:
        """Return the name of a segment's shard."""
        return f"segment-{segment:08d}"

    def cursor_path(self, segment: int) -> Path:
        """Return the path of a segment's cursor file."""
        return self.folder / f"cursor-{segment:08d}.json"

    def read_cursor(self, segment: int) -> Cursor | None:
        """Return where a segment begins in the source, or None if unknown."""
        if segment == 0:
            return Cursor()
        path = self.cursor_path(segment)
        with interpreting(path, remedy=REMEDY):
            return Cursor(**record["begins"]) if (record := _read(path)) else None

    def has_segment(self, segment: int) -> bool:
        """Return whether a segment is on disk and complete."""
        return (self.folder / f"{self.segment_name(segment)}.json").is_file()


def open_spool(job: Job, folder: Path | str, *, segment_tokens: int, quiet: bool = False) -> Spool:
    """Prepare a spool folder: write the tokenizer, the held-out set and the manifest.

    Sources are compared by size, not by content. Raises ValueError if the folder holds another job,
    or if `validation` is `hash`.
    """
    if parse_validation(job.validation)[0] == "hash":
        raise ValueError(
            f"data.validation={job.validation} needs the whole source, which data.streaming=true "
            f"never reads: give first:TOKENS, the path of a prepared folder or array, or none"
        )
    segment_tokens = check_value(segment_tokens, "segment_tokens", int, minimum=1, maximum=10**15)
    folder = Path(folder)
    check_target(job, folder)
    record = job.record(content=False) | {"segment_tokens": segment_tokens}
    # All processes of a machine call this at once; if the folder is ready, each holds it briefly.
    with lock_folder(folder, setting="data.path"):
        check_same_job(folder, record)
        (folder / ERROR).unlink(missing_ok=True)
        if _read(folder / JOB) != record:  # remove what is left of another job without segments
            shutil.rmtree(folder / TOKENIZER_FOLDER, ignore_errors=True)
            for path in (folder / SETTINGS, folder / MANIFEST, *folder.glob("cursor-*.json")):
                path.unlink(missing_ok=True)
            write_json(folder / JOB, record)
        if not (folder / MANIFEST).is_file():
            with show_progress("holding out", total_bytes=0, quiet=quiet):
                _make_ready(job, folder, record)
    settings = _read(folder / SETTINGS)
    if (fast := settings.pop("fast", None)) is not None:  # written before there was `gigatoken`
        settings["package"] = "tiktoken" if fast else "tokenizers"
    settings |= {"job": job, "folder": folder, "segment_tokens": segment_tokens}
    with interpreting(folder / SETTINGS, remedy=REMEDY):
        held = {int(index): HeldOut(**one) for index, one in settings.pop("held_out").items()}
        return Spool(held_out=held, **settings)


def _make_ready(job: Job, folder: Path, record: dict) -> None:
    """Write the tokenizer, the held-out set, the encoder settings and the manifest of a spool."""
    sources = job.open_sources()
    encoder = find_encoder(sources, write_tokenizer(job, sources, folder))
    units = open_units(sources, cut_text=encoder.cuts_text)
    held_out = write_first_tokens(job.validation, units, encoder, folder)
    held = {index: asdict(held) for index, held in held_out.items()}
    settings = {"package": encoder.package, "cuts_text": encoder.cuts_text, "held_out": held}
    write_json(folder / SETTINGS, settings)
    names = ["validation-first"] if parse_validation(job.validation)[0] == "first" else []
    splits = {"train": summarize(folder, []), "validation": summarize(folder, names)}
    identity = json.dumps([record, encoder.tokenizer.sha256]).encode()
    report, sha256 = report_skipped(sources), hashlib.sha256(identity).hexdigest()
    write_manifest(job, folder, encoder, splits, report, fingerprint=sha256)


def _read(path: Path) -> dict:
    return read_object(path, remedy=REMEDY) if path.is_file() else {}


def produce(spool: Spool, first: int, hint: dict | None, position: Any, workers: int) -> None:
    """Keep the spool filled until the parent process exits.

    `first` is the segment in which training begins, `hint` the cursor of a segment if a checkpoint
    has one, and `position` the shared number of the segment that training is reading.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the training process ends this one by END_SIGNAL
    signal.signal(END_SIGNAL, lambda *_: sys.exit())
    end_with_parent()
    try:
        with lock_folder(spool.folder, setting="data.path"):
            if hint and hint["segment"] <= first and not spool.read_cursor(hint["segment"]):
                begins = {"begins": hint["begins"], "sha256_before": None}
                write_json(spool.cursor_path(hint["segment"]), begins)
            _delete_far_from(spool, first)
            for segment in _write_segments(spool, first, workers):
                while segment >= _delete_far_from(spool, position.value) + SEGMENTS_AHEAD:
                    time.sleep(POLL_SECONDS)
    except Exception as error:  # recorded for the processes that wait for a segment
        record_error(spool.folder, error)


def _delete_far_from(spool: Spool, position: int) -> int:
    """Delete the segments that are not needed at segment `position`, and return `position`."""
    # It may lag: a resumed run may have read further already.
    near = range(position - SEGMENTS_BEHIND, position + SEGMENTS_BEHIND + SEGMENTS_AHEAD + 1)
    # Delete the .json first, without which a segment does not exist. This also removes the files of
    # a segment whose writing was interrupted.
    for path in sorted(spool.folder.glob("segment-*"), key=lambda path: path.suffix != ".json"):
        if int(path.name.split(".")[0].removeprefix("segment-")) not in near:
            path.unlink()
    return position


def _write_segments(spool: Spool, first: int, workers: int) -> Iterator[int]:
    """Write the missing segments from `first` on; yield each segment number once it is on disk."""
    segment = first
    while spool.has_segment(segment):
        yield segment
        segment += 1
    start = segment
    while (begins := spool.read_cursor(start)) is None:
        start -= 1  # without a cursor, start at an earlier segment and discard what comes before
    for number, (tokens, ends, after) in enumerate(_cut(spool, begins, workers), start=start):
        cursor_path = spool.cursor_path(number + 1)
        sha256 = hashlib.sha256(tokens.tobytes()).hexdigest()
        if _read(cursor_path).get("sha256_before") not in (None, sha256):
            raise ValueError(
                f"data.source={', '.join(spool.job.source_names())} has changed: its segment "
                f"{number} is not what it was before; restore the source, or start another run "
                f"from a checkpoint of this one (run.resume=PATH)"
            )
        if number >= segment:
            write_shard(spool.folder, spool.segment_name(number), tokens, ends)
        write_json(cursor_path, {"begins": asdict(after), "sha256_before": sha256})
        if number >= segment:
            yield number


def _cut(
    spool: Spool, begins: Cursor, workers: int
) -> Iterator[tuple[np.ndarray, np.ndarray, Cursor]]:
    """Yield `(tokens, document ends, cursor of the next)` for each segment from a cursor on."""
    size, skip = spool.segment_tokens, begins.tokens
    row, row_ends, places = None, np.empty(0, dtype=np.int64), []
    for place, tokens, ends in _groups(spool, begins, workers):
        offset = 0 if row is None else len(row)
        places.append((offset, place, skip))
        ends = ends[ends > skip] - skip + offset
        row = tokens[skip:] if row is None else np.concatenate([row, tokens[skip:]])
        row_ends, skip = np.concatenate([row_ends, ends]), 0
        while len(row) > size:
            last = max(i for i, (start, _, _) in enumerate(places) if start <= size)
            start, place, skipped = places[last]
            after = Cursor(place.epoch, place.unit, place.group, size - start + skipped)
            yield row[: size + 1], row_ends[row_ends <= size + 1], after
            row, row_ends = row[size:], row_ends[row_ends > size] - size
            places = [(0, place, after.tokens)] + [
                (begin - size, p, s) for begin, p, s in places[last + 1 :]
            ]


def _groups(
    spool: Spool, begins: Cursor, workers: int
) -> Iterator[tuple[Cursor, np.ndarray, np.ndarray]]:
    """Yield `(place, tokens, document ends)` of each group of documents from a cursor on."""
    shutil.rmtree(spool.folder / UNITS, ignore_errors=True)
    (spool.folder / UNITS).mkdir()
    tasks = _unit_tasks(spool, begins)
    report, epoch, last_epoch_with_text = Report(), begins.epoch, begins.epoch
    for cursor, paths, unit_report in run_tasks(
        _encode_unit, tasks, workers=workers, ahead=workers, survive_signals=True
    ):
        if cursor.epoch != epoch:  # each epoch rejects the same documents: count them once
            report, epoch = Report(), cursor.epoch
        report.add(unit_report)
        report.check(spool.job.max_rejected)
        update_left_out(spool.folder, report)
        if cursor.epoch > last_epoch_with_text + 1:
            break
        last_epoch_with_text = cursor.epoch if paths else last_epoch_with_text
        for number, path in enumerate(paths, start=cursor.group):
            tokens, ends = np.load(path), np.load(path.with_suffix(".ends.npy"))
            path.unlink()
            path.with_suffix(".ends.npy").unlink()
            yield Cursor(cursor.epoch, cursor.unit, number), tokens, ends
    names = ", ".join(spool.job.source_names())
    raise ValueError(f"data.source={names} leaves no document with text to train on")


def _unit_tasks(spool: Spool, begins: Cursor) -> Iterator[tuple[Path, Cursor, UnitTask]]:
    """Yield the task of each unit from a cursor on, forever."""
    units = open_units(spool.job.open_sources(), cut_text=spool.cuts_text)
    epoch, position, group = begins.epoch, begins.unit, begins.group
    while units:
        keys = derive_keys("units", epoch)
        order = permute(np.arange(len(units)), size=len(units), keys=keys).tolist()
        for place in range(position, len(units)):
            source, unit = units[order[place]]
            task = UnitTask(
                source=source,
                unit=unit,
                name=f"{epoch:03d}-{order[place]:05d}",
                tokenizer_folder=spool.folder / TOKENIZER_FOLDER,
                package=spool.package,
                cuts_text=spool.cuts_text,
                validation=spool.job.validation,
                held_out=spool.held_out.get(order[place], HeldOut()),
                max_rejected=spool.job.max_rejected,
            )
            yield spool.folder / UNITS, Cursor(epoch, place, group), task
            group = 0
        epoch, position = epoch + 1, 0


def _encode_unit(task: tuple[Path, Cursor, UnitTask]) -> tuple[Cursor, list[Path], Report]:
    """Write the ids of each group of a unit from the cursor's group on, and return the paths."""
    folder, cursor, unit = task
    paths, report = [], Report()
    groups = (group for group in gather_groups(unit, report) if group.split == "train")
    for group in itertools.islice(groups, cursor.group, None):
        tokens, ends = encode_group(unit, group)
        path = folder / f"{group.name}.npy"
        np.save(path, tokens)
        # A part of a large file counts as a document: what follows in the stream is another unit.
        np.save(path.with_suffix(".ends.npy"), ends)
        paths.append(path)
    return cursor, paths, report
