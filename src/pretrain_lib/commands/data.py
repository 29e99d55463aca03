"""The data subcommands: prepare, verify, inspect, overlap."""

import argparse
import shlex
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from pretrain_lib.commands.flag_names import in_terms_of_flags
from pretrain_lib.data.overlap import OverlapReport, find_overlap, format_overlap, write_overlap
from pretrain_lib.data.pool import count_cores
from pretrain_lib.data.prepare.holdout import holds_out_nothing
from pretrain_lib.data.prepare.job import Job, find_hints
from pretrain_lib.data.prepare.left_out import describe_left_out
from pretrain_lib.data.prepare.prepare import prepare
from pretrain_lib.data.prepare.target import check_target
from pretrain_lib.data.tokens.manifests import MANIFEST
from pretrain_lib.data.tokens.verify import has_own_hash, verify_folder
from pretrain_lib.files.outputs import check_file
from pretrain_lib.wording import plural

# Flags by which a recipe of 124M parameters and 10B tokens suits a text of less than so many.
FITTING = (
    (20 * 10**6, " --config quickstart.yaml", " a small GPT-2"),
    (25 * 10**8, " --schedule.epochs 4", ""),
)


def run_prepare(options: argparse.Namespace) -> None:
    """Tokenize text into shards, and print the command that trains on them."""
    job = Job(
        tuple(options.sources),
        options.tokenizer,
        options.train_tokenizer,
        options.validation,
        options.text_field,
        options.max_rejected,
        options.document_separator,
        options.loss_spans,
    )
    check_target(job, options.out)
    sources = job.open_sources()
    for hint in find_hints(job, sources):
        print(in_terms_of_flags(hint, "prepare"), file=sys.stderr)
    if options.validation != "none" and holds_out_nothing(sources, job.validation):
        print(_nothing_held_out(job.validation), file=sys.stderr)
    manifest = prepare(job, options.out, workers=options.workers)
    if (wanted := options.train_tokenizer or 0) > (reached := manifest["vocabulary_size"]):
        print(f"the text is too short for {wanted:,} ids: the tokenizer has {reached:,}")
    for line in describe_prepared(options.out, manifest):
        print(line)


def describe_prepared(folder: Path, manifest: dict) -> Iterator[str]:
    """Yield lines about a prepared folder, the last of them a command that trains on it."""
    for split, totals in manifest["splits"].items():
        documents = plural(totals["documents"], "document")
        yield f"{split:<12}{plural(totals['tokens'], 'token')} in {documents}"
    for line in describe_left_out(manifest["left_out"]):
        yield in_terms_of_flags(line, "prepare")
    yield f"vocabulary  {plural(manifest['vocabulary_size'], 'token')}"
    yield f"fingerprint {manifest['fingerprint'][:12]}"
    tokens = manifest["splits"]["train"]["tokens"]
    flags, model = next((choice for limit, *choice in FITTING if tokens < limit), ("", ""))
    command = f"pretrain train gpt2_124m{flags} --data.path {shlex.quote(str(folder))}"
    if not manifest["splits"]["validation"]["tokens"]:
        yield _nothing_held_out(manifest["validation"])
        command += " --data.validation none"
    run = Path("runs", folder.resolve().name)
    yield f"{folder} is ready. To train{model} on it:"
    yield f"  {command} --run.dir {shlex.quote(str(run))}"


def _nothing_held_out(rule: str) -> str:
    return (
        f"warning: --validation {rule} holds out no text, so a run has no validation loss and has "
        f"to be\n"
        f"         started with --data.validation none. Remedy: prepare into another folder with\n"
        f"         --validation first:TOKENS, which holds out the first TOKENS tokens"
    )


def run_verify(options: argparse.Namespace) -> None:
    """Verify the hashes of all files of prepared folders; raises ValueError if any differ."""
    damaged = {folder: count for folder in options.folders if (count := _verify(folder))}
    if damaged:
        counts = (
            f"{folder}: {plural(count, 'file')} {'is' if count == 1 else 'are'} not what was "
            f"written"
            for folder, count in damaged.items()
        )
        raise ValueError("; ".join(counts))


def _verify(folder: Path) -> int:
    """Print which files of a prepared folder differ, and return how many."""
    problems = verify_folder(folder)
    for problem in problems:
        print(problem)
    if not problems:
        print(f"{folder}: every file is as it was written")
    if not problems and not has_own_hash(folder):
        print(
            f"{folder / MANIFEST} was written by an earlier version and has no hash of itself: "
            f"what it says besides hashes was not checked"
        )
    return len(problems)


def run_inspect(options: argparse.Namespace) -> None:
    """Print statistics and a window of prepared folders or token arrays."""
    from pretrain_lib.data.inspection import inspect_data  # imports torch

    lines = inspect_data(
        options.paths,
        sequence_length=options.sequence_length,
        window=options.window,
        seed=options.seed,
        packing=options.packing,
        shuffle=options.shuffle,
        dtype=options.dtype,
        weights=options.weights,
        planned_tokens=options.tokens,
    )
    for line in lines:
        print(line)


def run_overlap(options: argparse.Namespace) -> None:
    """Find evaluation items whose n-grams occur in a text."""
    if options.out is not None:
        check_file(options.out, named="--out ", holds=[f.name for f in fields(OverlapReport)])
    report = find_overlap(
        options.sources,
        options.items,
        ngram=options.ngram,
        text_field=options.text_field,
        document_separator=options.document_separator,
        fields=options.fields or (),
        workers=options.workers or count_cores(),
    )
    print(format_overlap(report))
    if options.out is not None:
        write_overlap(report, options.out)
        print(f"the items that overlap are in {options.out}")
