"""The data subcommands: prepare, verify, inspect, overlap."""

import argparse

from pretrain_lib.commands.outputs import check_out
from pretrain_lib.data.overlap import find_overlap, format_overlap, write_overlap
from pretrain_lib.data.pool import count_cores
from pretrain_lib.data.prepare.groups import describe_left_out
from pretrain_lib.data.prepare.job import Job
from pretrain_lib.data.prepare.prepare import prepare
from pretrain_lib.data.tokens.shards import verify_folder


def run_prepare(options: argparse.Namespace) -> None:
    """Tokenize text into shards."""
    check_out(options.out, is_folder=True)
    job = Job(
        tuple(options.sources),
        options.tokenizer,
        options.train_tokenizer,
        options.validation,
        options.text_field,
        options.max_rejected,
    )
    manifest = prepare(job, options.out, workers=options.workers)
    for split, totals in manifest["splits"].items():
        print(f"{split:<12}{totals['tokens']:>16,} tokens {totals['documents']:>12,} documents")
    for line in describe_left_out(manifest["left_out"]):
        print(line)
    print(f"vocabulary {manifest['vocabulary_size']:,}, fingerprint {manifest['fingerprint'][:12]}")
    print(f"{options.out} is ready: train on it with --data.path {options.out}")


def run_verify(options: argparse.Namespace) -> None:
    """Verify the hashes of all files of a prepared folder; raises ValueError if any differ."""
    problems = verify_folder(options.folder)
    for problem in problems:
        print(problem)
    if problems:
        raise ValueError(f"{options.folder}: {len(problems)} files are not what was written")
    print(f"{options.folder}: every file is as it was written")


def run_inspect(options: argparse.Namespace) -> None:
    """Print statistics and a window of prepared folders or token arrays."""
    from pretrain_lib.data.inspection import inspect_data  # imports torch

    lines = inspect_data(
        options.paths,
        sequence_length=options.sequence_length,
        window=options.window,
        seed=options.seed,
        packing=options.packing,
        weights=options.weights,
        planned_tokens=options.tokens,
    )
    for line in lines:
        print(line)


def run_overlap(options: argparse.Namespace) -> None:
    """Find evaluation items whose n-grams occur in a text."""
    check_out(options.out)
    report = find_overlap(
        options.sources,
        options.items,
        ngram=options.ngram,
        text_field=options.text_field,
        fields=options.fields.split(",") if options.fields else (),
        workers=options.workers or count_cores(),
    )
    print(format_overlap(report))
    if options.out is not None:
        write_overlap(report, options.out)
        print(f"every item that overlaps is in {options.out}")
