"""Tokenize sources into shards, unit by unit; each unit is committed, and skipped after a restart.

The output depends only on the job (sources, tokenizer, split), not on the number of processes or
the order in which they finish.
"""

import hashlib
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pretrain_lib.data.pool import count, count_cores, run_tasks, show_progress, warm_up
from pretrain_lib.data.prepare.groups import Report, UnitTask, encode_group, gather_groups
from pretrain_lib.data.prepare.holdout import HeldOut, parse_validation, write_first_tokens
from pretrain_lib.data.prepare.job import (
    JOB,
    TOKENIZER_FOLDER,
    Job,
    check_same_job,
    find_encoder,
    has_shards,
    open_units,
    write_tokenizer,
)
from pretrain_lib.data.prepare.manifest import summarize, write_manifest
from pretrain_lib.data.text.encoder import Encoder
from pretrain_lib.data.text.sources import Source
from pretrain_lib.data.tokens.shards import (
    MANIFEST,
    lock_folder,
    read_manifest,
    write_json,
    write_shard,
)

UNIT = "unit"  # prefix of the files that commit a unit
SPLITS = ("train", "validation")
WORKER_BYTES = 8 * 2**20  # text per worker for which starting a process pays off


def prepare(job: Job, folder: Path, *, workers: int | None = None, quiet: bool = False) -> dict:
    """Tokenize the sources of a job into `folder` and return the manifest.

    Uses at most `workers` processes (default: one per core). If it is killed at any time and called
    again, it continues with the units that are not committed; a finished folder is left unchanged.
    Raises ValueError if the folder holds another job, or is being prepared by another process.
    """
    record = job.record()
    with lock_folder(folder, setting="data.path"):
        check_same_job(folder, record)
        if not has_shards(folder):  # clean up after an attempt that failed before its first unit
            shutil.rmtree(folder / TOKENIZER_FOLDER, ignore_errors=True)
            for path in folder.glob(f"{UNIT}-*.json"):
                path.unlink()
        if not (folder / MANIFEST).is_file():
            write_json(folder / JOB, record)
            _write_units(job, folder, workers=workers, quiet=quiet)
        return read_manifest(folder)


def _write_units(job: Job, folder: Path, *, workers: int | None, quiet: bool) -> None:
    sources = job.open_sources()
    if not quiet:
        _announce(job, folder)
    if workers != 1 and sum(source.estimated_bytes() or 0 for source in sources) > WORKER_BYTES:
        warm_up(_write_unit)
    tokenizer = write_tokenizer(job, sources, folder)
    encoder = find_encoder(sources, tokenizer)
    units = open_units(sources, cut_text=encoder.cuts_text)
    sizes = [source.unit_bytes(unit) for source, unit in units]
    done = [(folder / f"{_unit_name(index)}.json").is_file() for index in range(len(units))]
    done_bytes = sum(size for size, is_done in zip(sizes, done, strict=True) if is_done)
    missing = [size for size, is_done in zip(sizes, done, strict=True) if not is_done]
    # Units of unknown size, such as those of the Hub, are assumed to be large.
    worthwhile = sum(missing) // WORKER_BYTES if all(missing) else len(missing)
    workers = max(1, min(workers or count_cores(), len(missing), worthwhile))
    progress = show_progress(
        "preparing", total_bytes=sum(sizes), done_bytes=done_bytes, quiet=quiet
    )
    with progress:
        held_out = write_first_tokens(job.validation, units, encoder, folder)
        tasks = [
            (folder, index, _unit_task(job, folder, encoder, index, unit, held_out.get(index)))
            for index, unit in enumerate(units)
        ]
        report = Report()
        for unit_report in run_tasks(_write_unit, tasks, workers=workers):
            report.add(unit_report)
            report.check(job.max_rejected)
    splits = _collect_splits(job, folder, len(units))
    if not splits["train"]["documents"]:
        raise ValueError(
            f"data.source={', '.join(job.source_names())} leaves no document with text to train "
            f"on (data.validation={job.validation} holds out {splits['validation']['documents']}; "
            f"{report.empty} are empty, {report.rejected} could not be read"
            + f"{': ' if report.examples else ''}{'; '.join(report.examples)})"
        )
    write_manifest(job, folder, encoder, splits, report, fingerprint=_fingerprint(encoder, splits))


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
        fast=encoder.fast is not None,
        cuts_text=encoder.cuts_text,
        validation=job.validation,
        held_out=held_out or HeldOut(),
        max_rejected=job.max_rejected,
    )


def _unit_name(index: int) -> str:
    return f"{UNIT}-{index:05d}"


def _write_unit(task: tuple[Path, int, UnitTask]) -> Report:
    """Write the shards of one unit, then its JSON, which lists them and commits the unit."""
    folder, index, unit = task
    path = folder / f"{_unit_name(index)}.json"
    if path.is_file():
        return Report(**json.loads(path.read_text())["report"])
    report, names = Report(), {"train": [], "validation": []}
    size, counted = unit.source.unit_bytes(unit.unit), 0
    for group in gather_groups(unit, report):
        if not (folder / f"{group.name}.json").is_file():
            documents = encode_group(unit, group)
            write_shard(
                folder,
                group.name,
                documents,
                dtype=unit.load_encoder().dtype,
                text_bytes=group.text_bytes,
                last_ends=group.last_ends,
            )
        names[group.split].append(group.name)
        advance = min(group.text_bytes, size - counted)
        count(source_bytes=advance)
        counted += advance
    write_json(path, {"shards": names, "report": asdict(report)})
    count(source_bytes=size - counted)
    return report


def _collect_splits(job: Job, folder: Path, num_units: int) -> dict[str, dict]:
    """Return the manifest's entry for each split, from the shards of all units."""
    shards = [
        json.loads((folder / f"{_unit_name(index)}.json").read_text())["shards"]
        for index in range(num_units)
    ]
    names = {split: [name for unit in shards for name in unit[split]] for split in SPLITS}
    if parse_validation(job.validation)[0] == "first":
        names["validation"] = ["validation-first"]
    return {split: summarize(folder, names[split]) for split in SPLITS}


def _fingerprint(encoder: Encoder, splits: dict[str, dict]) -> str:
    """Return a hash of the tokens and document ends of all splits, and of the tokenizer."""
    hashes = [
        [split, shard["sha256"], shard["ends_sha256"]]
        for split, summary in splits.items()
        for shard in summary["shards"]
    ]
    identity = {"tokenizer": encoder.tokenizer.sha256, "shards": hashes}
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()
