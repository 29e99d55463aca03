"""The `pretrain` command: prepare, verify, inspect, overlap, export, eval and more."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import get_args

from pretrain_lib.data.windows.best_fit import Packing
from pretrain_lib.errors import DONE, INTERRUPTED, report_errors
from pretrain_lib.evaluate.suites import SUITES


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the `pretrain` command."""
    options = _build_parser().parse_args(arguments)
    try:
        # What cannot be read or written is the user's to mend as well.
        code = report_errors(lambda: _run(options), user_errors=(ValueError, OSError))
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = DONE
    except KeyboardInterrupt:
        print("interrupted: what is written stays, the same command goes on", file=sys.stderr)
        code = INTERRUPTED
    sys.exit(code)


def _run(options: argparse.Namespace) -> int | None:
    # Imported now, since torch takes a second that `--help` and workers of `prepare` do not need.
    module = import_module(f"pretrain_lib.commands.{options.module}")
    return getattr(module, f"run_{options.command}")(options)


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pretrain", description=main.__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(module: str, name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.set_defaults(module=module, command=name)
        return added

    _add_data_commands(partial(command, "data"))
    _add_model_commands(partial(command, "model"))
    return parser


def _add_data_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    add = command("prepare", "Turn text into shards of tokens.").add_argument
    add("sources", nargs="+", metavar="SOURCE", help="python-stdlib, files, folders, or a hub name")
    add("--tokenizer", help="a folder, a tokenizer.json, or a hub name")
    add("--train_tokenizer", type=int, metavar="VOCABULARY", help="train a byte-level BPE")
    add("--out", type=Path, required=True)
    add("--workers", type=int, help="processes (default: one per core)")
    add("--max_rejected", type=int, default=100, help="documents that may be unreadable")
    add("--validation", default="hash", help="hash[:SHARE], first:TOKENS or none")
    add("--text_field", default="text", help="the column or JSON field with the text")

    add = command("verify", "Check every hash of a prepared folder.").add_argument
    add("folder", type=Path)

    text = "Show what lies in prepared folders or arrays, and what a run makes of it."
    add = command("inspect", text).add_argument
    add("paths", type=Path, nargs="+", metavar="PATH", help="prepared folders, .npy, .bin, .ds")
    add("--sequence_length", type=int, default=256, help="tokens in a window")
    add("--packing", choices=get_args(Packing), default="concat")
    add("--weights", type=float, nargs="+", help="shares of a mixture, one for each path")
    add("--tokens", help="of a planned run, such as 10e9: shows the epochs of each path")
    add("--window", type=int, default=0, help="the window to show, counted from the run's start")
    add("--seed", type=int, default=0)

    text = "Find evaluation items whose n-grams of words occur in a text."
    add = command("overlap", text).add_argument
    add("sources", nargs="+", metavar="SOURCE", help="as for prepare")
    add("--items", type=Path, nargs="+", required=True, help=".jsonl files, an item a line")
    add("--fields", help="of the items, separated by commas (default: every text in them)")
    add("--ngram", type=int, default=13, help="words")
    add("--text_field", default="text", help="the column or JSON field with the source's text")
    add("--workers", type=int, help="processes (default: one per core)")
    add("--out", type=Path, help="where the whole report goes, as JSON")


def _add_model_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    add = command("tasks", "Build lm-eval tasks from held-out text.").add_argument
    add("folder", type=Path, help="a prepared folder")
    add("--out", type=Path, required=True)
    add("--items", type=int, default=200)

    add = command("export", "Write a checkpoint as a plain model folder.").add_argument
    add("checkpoint", type=Path, help="a checkpoint, or a run folder: its newest")
    add("--out", type=Path, required=True)
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--max_shard_size", metavar="SIZE", help="of a file of weights: 500MB, 2GB, ...")
    add("--scores", type=Path, help="a JSON of `eval --out`, for the model card")
    add("--push_to_hub", metavar="OWNER/NAME", help="upload it to the hub as well")
    add("--private", action="store_true", help="for a repository that is made on the hub")

    parser = command("eval", "Score a model folder with lm-eval-harness.")
    add = parser.add_argument
    add("folder", type=Path, help="a model folder, a checkpoint, or a run folder")
    tasks = parser.add_mutually_exclusive_group(required=True)
    tasks.add_argument("--tasks", help="names, separated by commas")
    tasks.add_argument("--suite", choices=SUITES, help="the tasks of a recipe")
    add("--include_path", type=Path, help="a folder with task files of your own")
    add("--limit", type=int, help="items per task")
    add("--batch_size", type=int, default=8)
    add("--dtype", default="float32")
    add("--device")
    add("--num_fewshot", type=int)
    add("--harness", action="store_true", help="score with lm-eval's own model, slower")
    add("--out", type=Path, help="where lm-eval's JSON goes")

    add = command("sample", "Let a model write.").add_argument
    add("folder", type=Path, help="a model folder, a checkpoint, or a run folder")
    add("--prompt", action="append", required=True)
    add("--count", type=int, default=1)
    add("--tokens", type=int, default=64)
    add("--temperature", type=float, default=1.0)
    add("--top_k", type=int)
    add("--top_p", type=float)
    add("--seed", type=int, default=0)

    add = command("plot", "Draw the curves of runs.").add_argument
    add("runs", type=Path, nargs="+", metavar="RUN")
    add("--out", type=Path)


if __name__ == "__main__":
    main()
