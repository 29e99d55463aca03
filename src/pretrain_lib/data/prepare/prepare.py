"""Tokenize sources into shards, unit by unit; each unit is committed, and skipped after a restart.

The output depends only on the job (sources, tokenizer, split), not on the number of processes or
the order in which they finish.
"""

import hashlib
import json
import shutil
import sys
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from pretrain_lib.data.pool import count, count_cores, run_tasks, show_progress, warm_up
from pretrain_lib.data.prepare.groups import UnitTask, encode_group, gather_groups, mask_group
from pretrain_lib.data.prepare.holdout import HeldOut, parse_validation, write_first_tokens
from pretrain_lib.data.prepare.job import (
    JOB,
    TOKENIZER_FOLDER,
    Job,
    check_same_job,
    drop_shards,
    find_encoder,
    has_shards,
    open_units,
    write_tokenizer,
)
from pretrain_lib.data.prepare.left_out import Report, report_skipped
from pretrain_lib.data.prepare.loss_spans import check_spans_tokenizer
from pretrain_lib.data.prepare.manifest import summarize, write_manifest
from pretrain_lib.data.prepare.target import check_target
from pretrain_lib.data.remote import Unreachable
from pretrain_lib.data.text.dataset_rows import check_workers
from pretrain_lib.data.text.encoder import Encoder
from pretrain_lib.data.text.sources import FileSource, Source
from pretrain_lib.data.tokens.manifests import REMEDY
from pretrain_lib.data.tokens.shards import MANIFEST, MASK_HASHES, read_manifest, write_shard
from pretrain_lib.files.locks import lock_folder
from pretrain_lib.files.reading import interpreting, read_object
from pretrain_lib.files.writes import write_json

UNIT = "unit"  # prefix of the files that commit a unit
SPLITS = ("train", "validation")
UNITS_IN_TURN = 32  # given to a process at once
WAITING_WRITES = 4  # of shards and units, which hold tokens in memory
Task = tuple[Path, int, UnitTask]
WORKER_BYTES = 8 * 2**20  # text per worker for which starting a process pays off


def prepare(
    job: Job, folder: Path | str, *, workers: int | None = None, quiet: bool = False
) -> dict:
    """Tokenize the sources of a job into `folder` and return the manifest.

    Uses at most `workers` processes (default: one per core). If it is killed at any time and called
    again, it continues with the units that are not committed; a finished folder is left unchanged.
    Raises ValueError if the folder holds another job, or is being prepared by another process.
    """
    folder = Path(folder)
    check_target(job, folder)
    sources = job.open_sources()
    record = job.record(sources)
    with lock_folder(folder, setting="data.path"):
        check_same_job(folder, record)
        if not has_shards(folder):  # clean up after an attempt that failed before its first unit
            _clear(folder)
        if not (folder / MANIFEST).is_file():
            write_json(folder / JOB, record)
            try:
                _write_units(job, sources, folder, workers=workers, quiet=quiet)
            except ValueError:
                if not has_shards(folder):
                    _clear(folder)
                raise
        return read_manifest(folder)


def _clear(folder: Path) -> None:
    """Delete what an attempt that wrote no shard has left."""
    shutil.rmtree(folder / TOKENIZER_FOLDER, ignore_errors=True)
    _drop_units(folder)
    (folder / JOB).unlink(missing_ok=True)


def _write_units(
    job: Job, sources: Sequence[Source], folder: Path, *, workers: int | None, quiet: bool
) -> None:
    if not quiet:
        _announce(job, folder)
    if workers != 1 and sum(source.estimated_bytes() or 0 for source in sources) > WORKER_BYTES:
        warm_up(_write_in_turn)
    tokenizer = write_tokenizer(job, sources, folder)
    if job.loss_spans is not None:
        check_spans_tokenizer(tokenizer, job.loss_spans)
    encoder = find_encoder(sources, tokenizer)
    units = open_units(sources, cut_text=encoder.cuts_text)
    sizes = [source.unit_bytes(unit) for source, unit in units]
    done = [(folder / f"{_unit_name(index)}.json").is_file() for index in range(len(units))]
    done_bytes = sum(size for size, is_done in zip(sizes, done, strict=True) if is_done)
    missing = [size for size, is_done in zip(sizes, done, strict=True) if not is_done]
    # Units of unknown size, such as those of the Hub, are assumed to be large.
    worthwhile = sum(missing) // WORKER_BYTES if all(missing) else len(missing)
    workers = max(1, min(workers or count_cores(), len(missing), worthwhile))
    check_workers(sources, workers)
    progress = show_progress(
        "preparing", total_bytes=sum(sizes), done_bytes=done_bytes, quiet=quiet
    )
    with progress:
        held_out = write_first_tokens(job.validation, units, encoder, folder)
        tasks = [
            (folder, index, _unit_task(job, folder, encoder, index, unit, held_out.get(index)))
            for index, unit in enumerate(units)
        ]
        report = report_skipped(sources)
        each = max(1, min(UNITS_IN_TURN, len(tasks) // (4 * workers)))
        turns = [tasks[start : start + each] for start in range(0, len(tasks), each)]
        for unit_report in chain.from_iterable(run_tasks(_write_in_turn, turns, workers=workers)):
            report.add(unit_report)
            report.check(job.max_rejected)
    splits = _collect_splits(job, folder, len(units))
    try:
        _check_versions(sources)
        _check_train_split(job, splits, report)
    except Unreachable:  # nothing is known to be wrong
        raise
    except ValueError:
        _drop_units(folder)  # or the folder would be refused to the job that does better
        raise
    write_manifest(job, folder, encoder, splits, report, fingerprint=_fingerprint(encoder, splits))


def _check_versions(sources: Sequence[Source]) -> None:
    """Raise ValueError if a remote file has changed since it was listed."""
    for source in sources:
        if isinstance(source, FileSource):
            source.check_versions()


def _drop_units(folder: Path) -> None:
    """Delete what units were written, and the records that commit them first."""
    for path in folder.glob(f"{UNIT}-*.json"):
        path.unlink()
    drop_shards(folder)


def _check_train_split(job: Job, splits: dict[str, dict], report: Report) -> None:
    """Raise ValueError if there is nothing to train on."""
    if not splits["train"]["documents"]:
        raise ValueError(
            f"data.source={', '.join(job.source_names())} leaves no document with text to train "
            f"on (data.validation={job.validation} holds out {splits['validation']['documents']}; "
            f"{report.empty} are empty, {report.rejected} could not be read"
            + f"{': ' if report.examples else ''}{'; '.join(report.examples)})"
        )
    if splits["train"].get("counted_tokens") == 0:
        raise ValueError(
            f"data.loss_spans={job.loss_spans!r} leaves out every token of the training text; give "
            f"a field with the [start, end] of what to train on"
        )


def _announce(job: Job, folder: Path) -> None:
    tokenizer = "tokenizing"
    if job.tokenizer is None and not (folder / TOKENIZER_FOLDER).is_dir():
        tokenizer = f"training a tokenizer of {job.train_tokenizer:,} tokens, then tokenizing"
    names = ", ".join(job.source_names())
    print(f"preparing {names} in {folder}: {tokenizer}", file=sys.stderr)


def _unit_task(
    job: Job,
    folder: Path,
    encoder: Encoder,
    index: int,
    unit: tuple[Source, Any],
    held_out: HeldOut | None,
) -> UnitTask:
    return UnitTask(
        source=unit[0],
        unit=unit[1],
        name=f"{index:05d}",
        tokenizer_folder=folder / TOKENIZER_FOLDER,
        package=encoder.package,
        cuts_text=encoder.cuts_text,
        validation=job.validation,
        held_out=held_out or HeldOut(),
        max_rejected=job.max_rejected,
        has_spans=job.loss_spans is not None,
    )


def _unit_name(index: int) -> str:
    return f"{UNIT}-{index:05d}"


def _write_in_turn(tasks: Sequence[Task]) -> list[Report]:
    """Write the units of several tasks: the files of one while the next is tokenized."""
    reports, writes = [], deque()
    with ThreadPoolExecutor(1, thread_name_prefix="writer") as writer:
        for task in tasks:
            reports.append(_write_unit(task, writer, writes))
            while len(writes) > WAITING_WRITES:
                writes.popleft().result()
        for write in writes:
            write.result()
    return reports


def _write_unit(task: Task, writer: ThreadPoolExecutor, writes: deque[Future]) -> Report:
    """Let `writer` write the shards of a unit, then its JSON; add what it does to `writes`."""
    folder, index, unit = task
    path = folder / f"{_unit_name(index)}.json"
    if path.is_file():
        with interpreting(path, remedy=REMEDY):
            finished, report = Report(**read_object(path, remedy=REMEDY)["report"]), Report()
            for _ in range(2):  # two of the same can be added, if nothing is wrong with them
                report.add(finished)
            return finished
    report, names, shards = Report(), {"train": [], "validation": []}, []
    size, counted = unit.source.unit_bytes(unit.unit), 0
    for group in gather_groups(unit, report):
        if not (folder / f"{group.name}.json").is_file():
            tokens, ends = encode_group(unit, group)
            write = writer.submit(
                write_shard,
                folder,
                group.name,
                tokens,
                ends if group.last_ends else ends[:-1],
                text_bytes=group.text_bytes,
                mask=mask_group(unit, group, tokens, ends),
            )
            shards.append(write)
        names[group.split].append(group.name)
        advance = min(group.text_bytes, size - counted)
        count(source_bytes=advance)
        counted += advance
    record = {"shards": names, "report": asdict(report)}
    writes.extend([*shards, writer.submit(_commit_unit, path, record, shards)])
    count(source_bytes=size - counted)
    return report


def _commit_unit(path: Path, record: dict, shards: Sequence[Future]) -> None:
    """Write the JSON of a unit, which lists its shards and commits it."""
    for shard in shards:
        shard.result()  # raises what went wrong: a unit without its shards is not committed
    write_json(path, record)


def _collect_splits(job: Job, folder: Path, num_units: int) -> dict[str, dict]:
    """Return the manifest's entry for each split, from the shards of all units."""
    names = {split: [] for split in SPLITS}
    for path in (folder / f"{_unit_name(index)}.json" for index in range(num_units)):
        with interpreting(path, remedy=REMEDY):
            shards = read_object(path, remedy=REMEDY)["shards"]
            for split in SPLITS:
                if not isinstance(shards[split], list):
                    raise TypeError(f"shards.{split}={shards[split]!r}")
                names[split] += map(str, shards[split])
    if parse_validation(job.validation)[0] == "first":
        names["validation"] = ["validation-first"]
    return {split: summarize(folder, names[split]) for split in SPLITS}


def _fingerprint(encoder: Encoder, splits: dict[str, dict]) -> str:
    """Return a hash of the tokens and document ends of all splits, and of the tokenizer."""
    kinds = ("sha256", "ends_sha256")
    hashes = [
        [split, *(shard[key] for key in (*kinds, *MASK_HASHES.values()) if key in shard)]
        for split, summary in splits.items()
        for shard in summary["shards"]
    ]
    identity = {"tokenizer": encoder.tokenizer.sha256, "shards": hashes}
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()
