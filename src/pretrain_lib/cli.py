"""The `pretrain` command: prepare, verify, inspect, overlap, export, eval and more. Floor 7."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path

import torch

from pretrain_lib.checkpoint import FILES, find_newest, verify_checkpoint
from pretrain_lib.command import DONE, report_errors
from pretrain_lib.config import PACKINGS
from pretrain_lib.data.inspection import describe_left_out, inspect_data
from pretrain_lib.data.job import Job
from pretrain_lib.data.overlap import find_overlap, format_overlap, write_overlap
from pretrain_lib.data.pool import count_cores
from pretrain_lib.data.prepare import prepare
from pretrain_lib.data.shards import verify_folder
from pretrain_lib.data.tokenizer import load_tokenizer
from pretrain_lib.evaluate.harness import evaluate_folder, format_table, write_results
from pretrain_lib.evaluate.local_tasks import write_local_tasks
from pretrain_lib.export import EXPORT_DTYPES, export_checkpoint
from pretrain_lib.generate import sample_texts
from pretrain_lib.models.hf import load_pretrained
from pretrain_lib.report import plot_runs
from pretrain_lib.run_folder import CHECKPOINTS
from pretrain_lib.units import TokenCount

INTERRUPTED = 130  # as shells have it
Command = Callable[[argparse.Namespace], int | None]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the `pretrain` command."""
    options = _build_parser().parse_args(arguments)
    try:
        # What cannot be read or written is the user's to mend as well.
        code = report_errors(lambda: options.run(options), user_errors=(ValueError, OSError))
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = DONE
    except KeyboardInterrupt:
        print("interrupted: what is written stays, the same command goes on", file=sys.stderr)
        code = INTERRUPTED
    sys.exit(code)


def _prepare(options: argparse.Namespace) -> None:
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


def _verify(options: argparse.Namespace) -> None:
    problems = verify_folder(options.folder)
    for problem in problems:
        print(problem)
    if problems:
        raise ValueError(f"{options.folder}: {len(problems)} files are not what was written")
    print(f"{options.folder}: every file is as it was written")


def _inspect(options: argparse.Namespace) -> None:
    if options.window < 0:
        raise ValueError(f"--window {options.window} must be at least 0")
    lines = inspect_data(
        options.paths,
        sequence_length=options.sequence_length,
        window=options.window,
        seed=options.seed,
        packing=options.packing,
        weights=options.weights,
        planned_tokens=options.tokens and TokenCount.parse(options.tokens),
    )
    for line in lines:
        print(line)


def _overlap(options: argparse.Namespace) -> None:
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


def _tasks(options: argparse.Namespace) -> None:
    if options.items < 1:
        raise ValueError(f"--items {options.items} must be at least 1")
    names = write_local_tasks(options.folder, options.out, items=options.items)
    print(f"{options.out}: {', '.join(names)} (--tasks NAME --include_path {options.out})")


def _export(options: argparse.Namespace) -> None:
    source = model_folder(options.checkpoint)
    with _without_foreign_progress():
        difference = export_checkpoint(source, options.out, dtype=EXPORT_DTYPES[options.dtype])
    print(
        f"{options.out}: exported from {source}; loaded again by transformers, its logits are "
        f"within {difference:.1e} of the model's"
    )


def _eval(options: argparse.Namespace) -> None:
    folder = model_folder(options.folder)
    print(f"scoring {folder}")
    with _without_foreign_progress():
        results = evaluate_folder(
            folder,
            options.tasks.split(","),
            include_path=options.include_path,
            limit=options.limit,
            batch_size=options.batch_size,
            dtype=options.dtype,
            device=options.device,
            num_fewshot=options.num_fewshot,
        )
    print(format_table(results))
    if options.out is not None:
        write_results(results, options.out)
        print(f"results in {options.out}")


def _sample(options: argparse.Namespace) -> None:
    folder = model_folder(options.folder)
    model = load_pretrained(folder).to("cuda" if torch.cuda.is_available() else "cpu")
    texts = sample_texts(
        model,
        load_tokenizer(folder),
        options.prompt,
        per_prompt=options.count,
        new_tokens=options.tokens,
        context_length=model.config.context_length,
        seed=options.seed,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
    )
    for text in texts:
        print(f"{text['prompt']}{text['text']}\n---")


def _plot(options: argparse.Namespace) -> None:
    for path in plot_runs(options.runs, options.out):
        print(path)


@contextmanager
def _without_foreign_progress() -> Iterator[None]:
    """Keep the progress bars and warnings of other packages off a console that is no terminal."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if sys.stderr.isatty():
        yield
    else:
        with redirect_stderr(StringIO()):  # lm-eval's bars have no switch; errors are raised
            yield


def model_folder(path: Path) -> Path:
    """Return the model folder that `path` is, or the newest checkpoint if it is a run folder."""
    if (path / FILES).is_file() and (problems := verify_checkpoint(path)):
        raise ValueError(f"{path} is not whole: {'; '.join(problems)}")
    if (path / "config.json").is_file():
        return path
    newest = find_newest(path / CHECKPOINTS) if (path / CHECKPOINTS).is_dir() else None
    if newest is None:
        raise ValueError(f"{path} is neither a model folder (config.json) nor a run with one")
    return newest


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pretrain", description=main.__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Command, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    _add_data_commands(command)
    _add_model_commands(command)
    return parser


def _add_data_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    add = command("prepare", _prepare, "Turn text into shards of tokens.").add_argument
    add("sources", nargs="+", metavar="SOURCE", help="python-stdlib, files, folders, or a hub name")
    add("--tokenizer", help="a folder, a tokenizer.json, or a hub name")
    add("--train_tokenizer", type=int, metavar="VOCABULARY", help="train a byte-level BPE")
    add("--out", type=Path, required=True)
    add("--workers", type=int, help="processes (default: one per core)")
    add("--max_rejected", type=int, default=100, help="documents that may be unreadable")
    add("--validation", default="hash", help="hash[:SHARE], first:TOKENS or none")
    add("--text_field", default="text", help="the column or JSON field with the text")

    add = command("verify", _verify, "Check every hash of a prepared folder.").add_argument
    add("folder", type=Path)

    text = "Show what lies in prepared folders or arrays, and what a run makes of it."
    add = command("inspect", _inspect, text).add_argument
    add("paths", type=Path, nargs="+", metavar="PATH", help="prepared folders, .npy, .bin, .ds")
    add("--sequence_length", type=int, default=256, help="tokens in a window")
    add("--packing", choices=PACKINGS, default="concat")
    add("--weights", type=float, nargs="+", help="shares of a mixture, one for each path")
    add("--tokens", help="of a planned run, such as 10e9: shows the epochs of each path")
    add("--window", type=int, default=0, help="the window to show, counted from the run's start")
    add("--seed", type=int, default=0)

    text = "Find evaluation items whose n-grams of words occur in a text."
    add = command("overlap", _overlap, text).add_argument
    add("sources", nargs="+", metavar="SOURCE", help="as for prepare")
    add("--items", type=Path, nargs="+", required=True, help=".jsonl files, an item a line")
    add("--fields", help="of the items, separated by commas (default: every text in them)")
    add("--ngram", type=int, default=13, help="words")
    add("--text_field", default="text", help="the column or JSON field with the source's text")
    add("--workers", type=int, help="processes (default: one per core)")
    add("--out", type=Path, help="where the whole report goes, as JSON")

    add = command("tasks", _tasks, "Build lm-eval tasks from held-out text.").add_argument
    add("folder", type=Path, help="a prepared folder")
    add("--out", type=Path, required=True)
    add("--items", type=int, default=200)


def _add_model_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    add = command("export", _export, "Write a checkpoint as a plain model folder.").add_argument
    add("checkpoint", type=Path, help="a checkpoint, or a run folder: its newest")
    add("--out", type=Path, required=True)
    add("--dtype", choices=EXPORT_DTYPES, default="float32")

    add = command("eval", _eval, "Score a model folder with lm-eval-harness.").add_argument
    add("folder", type=Path, help="a model folder, a checkpoint, or a run folder")
    add("--tasks", required=True, help="names, separated by commas")
    add("--include_path", type=Path, help="a folder with task files of your own")
    add("--limit", type=int, help="items per task")
    add("--batch_size", type=int, default=8)
    add("--dtype", default="float32")
    add("--device")
    add("--num_fewshot", type=int)
    add("--out", type=Path, help="where lm-eval's JSON goes")

    add = command("sample", _sample, "Let a model write.").add_argument
    add("folder", type=Path, help="a model folder, a checkpoint, or a run folder")
    add("--prompt", action="append", required=True)
    add("--count", type=int, default=1)
    add("--tokens", type=int, default=64)
    add("--temperature", type=float, default=1.0)
    add("--top_k", type=int)
    add("--top_p", type=float)
    add("--seed", type=int, default=0)

    add = command("plot", _plot, "Draw the curves of runs.").add_argument
    add("runs", type=Path, nargs="+", metavar="RUN")
    add("--out", type=Path)


if __name__ == "__main__":
    main()
