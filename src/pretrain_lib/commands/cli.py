"""Parse the flags of the `pretrain` command and call its subcommands."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Literal

from pretrain_lib.commands.flag_names import in_terms_of_flags
from pretrain_lib.commands.recipes import RECIPES, add_train_flags, add_tune_flags
from pretrain_lib.config.flags import Parser, add_argument
from pretrain_lib.config.units import ByteCount, DeviceName, Names, Text, TokenCount
from pretrain_lib.data.tokens.headerless import IdType
from pretrain_lib.data.windows.best_fit import Packing
from pretrain_lib.data.windows.shuffled import Shuffle
from pretrain_lib.errors import (
    DONE,
    INTERRUPTED,
    raised_here,
    report_errors,
)
from pretrain_lib.evaluate.suites import SUITES
from pretrain_lib.files.console import open_console
from pretrain_lib.values import Rule

DESCRIPTION = "Pretrain language models: from text to a scored, exported model."
AddCommand = Callable[[str, str], Parser]
SOURCE = Rule(str, help="python-stdlib, files, folders, URLs, or a hub name")
SEPARATOR = Rule(str, help="a line between the documents of a .txt file")
RECIPE = Rule(str, help=f"{', '.join(RECIPES)}, or the path of a .py file")
TEXT_FIELD = Rule(str, help="the column or JSON field with the text")
SEED = Rule(int, minimum=0, maximum=2**63 - 1, help="of the random draws")
WORKERS = Rule(int, minimum=1, maximum=4096, unit="processes", help="by default one per core")
MODEL = Rule(Path, help="a model folder, a checkpoint, or a run folder: its newest")
INCLUDE_PATH = Rule(Path, help="a folder with task files of your own")
SHELLS = ("bash", "zsh", "tcsh")
LASTING = ("train", "tune", "prepare")  # whose work goes on when nobody reads what they print


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the `pretrain` command."""
    open_console()
    try:
        # A file that cannot be read or written is a user's error as well.
        code = report_errors(lambda: _run(arguments), user_errors=(ValueError, OSError))
    except BrokenPipeError:  # the reader of our output, such as `head`, has closed the pipe
        code = DONE
    except KeyboardInterrupt:
        print("interrupted: what is written stays, the same command goes on", file=sys.stderr)
        code = INTERRUPTED
    try:
        sys.stdout.flush()
    except OSError:  # Python would try it again at its end, and exit with a code of its own
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _run(arguments: Sequence[str] | None) -> int | None:
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return DONE
    if options.command in LASTING:
        open_console(lasting=True)
    # Imported late, because `--help` and the workers of `prepare` do not need torch, which is slow
    # to import.
    module = import_module(f"pretrain_lib.commands.{options.module}")
    try:
        code = getattr(module, f"run_{options.command}")(options)
        sys.stdout.flush()
        return code
    except ValueError as error:
        if not raised_here(error):
            raise
        raise ValueError(in_terms_of_flags(str(error), options.command)) from error


def build_parser() -> Parser:
    """Build the parser of the command and all subcommands."""
    parser = Parser(prog="pretrain", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"pretrain_lib {_version()}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(metavar="COMMAND")

    def command(module: str, name: str, text: str) -> Parser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(module=module, command=name)
        return added

    _add_recipe_commands(partial(command, "recipes"))
    _add_tune(partial(command, "tune"))
    _add_data_commands(partial(command, "data"))
    _add_model_commands(partial(command, "model"))
    _add_eval(partial(command, "model"))
    _add_report_commands(partial(command, "report"))
    return parser


def _version() -> str:
    from importlib.metadata import version

    return version("pretrain_lib")


def _add_recipe_commands(command: AddCommand) -> None:
    text = "Copy a recipe and its overlays into a folder, to be changed there."
    add = partial(add_argument, command("new", text))
    add("recipe", Rule(Literal[tuple(RECIPES)], help="a recipe of this package"), metavar="RECIPE")
    add("out", Rule(Path, help="the folder, which is made"), metavar="FOLDER")

    text = "Run a recipe under `accelerate launch`, on all GPUs or on the CPU."
    parser = command("train", text)
    add_argument(parser, "recipe", RECIPE, metavar="RECIPE")
    add_train_flags(parser)
    text = "the recipe's own, such as --data.path DATA; `pretrain train RECIPE --help` lists them"
    _add_rest(parser, text)

    add = partial(add_argument, command("completion", "Print the completion script of a shell."))
    add("shell", Rule(Literal[SHELLS], help="the shell"), metavar="SHELL")


def _add_tune(command: AddCommand) -> None:
    text = "Find the learning rates of a recipe by short runs of a smaller model."
    parser = command("tune", text)
    add_argument(parser, "recipe", RECIPE, metavar="RECIPE")
    add_tune_flags(parser)
    text = "the recipe's own, such as --data.path DATA, which all runs are given"
    _add_rest(parser, text)


def _add_data_commands(command: AddCommand) -> None:
    _add_prepare(command)
    add = partial(add_argument, command("verify", "Check every hash of prepared folders."))
    add("folders", Rule(Path, help="prepared folders"), nargs="+", metavar="FOLDER")
    _add_inspect(command)
    _add_overlap(command)


def _add_prepare(command: AddCommand) -> None:
    add = partial(add_argument, command("prepare", "Turn text into shards of tokens."))
    add("sources", SOURCE, nargs="+", metavar="SOURCE")
    add("--tokenizer", Rule(str, help="a folder, a tokenizer.json, or a hub name"))
    vocabulary = Rule(int, minimum=257, unit="ids", help="train a byte-level BPE")
    add("--train_tokenizer", vocabulary, metavar="VOCABULARY")
    add("--out", Rule(Path, help="the folder of the shards"), required=True)
    add("--workers", WORKERS)
    rejected = Rule(int, minimum=0, help="documents that may be unreadable")
    add("--max_rejected", rejected, default=100)
    add("--validation", Rule(str, help="hash[:SHARE], first:TOKENS or none"), default="hash")
    add("--text_field", TEXT_FIELD, default="text")
    add("--document_separator", SEPARATOR, metavar="TEXT")
    spans = Rule(str, help="a field of JSON lines: the [start, end] in characters to train on")
    add("--loss_spans", spans, metavar="FIELD")


def _add_inspect(command: AddCommand) -> None:
    text = "Show what lies in prepared folders or arrays, and what a run makes of it."
    add = partial(add_argument, command("inspect", text))
    add(
        "paths",
        Rule(str, help="prepared folders, .npy, .bin, .ds, index.json, also behind URLs"),
        nargs="+",
        metavar="PATH",
    )
    length = Rule(int, minimum=1, unit="tokens", help="length of a window")
    add("--sequence_length", length, default=256)
    add("--packing", Rule(Packing, help="how documents are packed"), default="concat")
    add("--shuffle", Rule(Shuffle, help="what each epoch permutes"), default="windows")
    add("--dtype", Rule(IdType, help="of the ids in arrays without a header"))
    weights = Rule(float, above=0, help="shares of a mixture, one for each path")
    add("--weights", weights, nargs="+", metavar="SHARE")
    planned = Rule(TokenCount, minimum=1, help="of a planned run: shows the epochs of each path")
    add("--tokens", planned)
    window = Rule(int, minimum=0, help="the window to show, counted from the run's start")
    add("--window", window, default=0)
    add("--seed", SEED, default=0)


def _add_overlap(command: AddCommand) -> None:
    text = "Find evaluation items whose n-grams of words occur in a text."
    add = partial(add_argument, command("overlap", text))
    add("sources", SOURCE, nargs="+", metavar="SOURCE")
    items = Rule(Path, help=".jsonl files, an item a line")
    add("--items", items, nargs="+", required=True, metavar="FILE")
    add("--fields", Rule(Names, help="of the items; by default every text"))
    add("--ngram", Rule(int, minimum=1, unit="words", help="length of an n-gram"), default=13)
    add("--text_field", TEXT_FIELD, default="text")
    add("--document_separator", SEPARATOR, metavar="TEXT")
    add("--workers", WORKERS)
    add("--out", Rule(Path, help="where the whole report goes, as JSON"))


def _add_model_commands(command: AddCommand) -> None:
    add = partial(add_argument, command("tasks", "Build lm-eval tasks from held-out text."))
    add("folder", Rule(Path, help="a prepared folder"), metavar="FOLDER")
    add("--out", Rule(Path, help="the folder of the task files"), required=True)
    add("--items", Rule(int, minimum=1, help="items of heldout_choice"), default=200)

    parser = command("export", "Write a checkpoint as a plain model folder.")
    add = partial(add_argument, parser)
    checkpoint = Rule(Path, help="a checkpoint, or a run folder: its newest")
    add("checkpoint", checkpoint, metavar="CHECKPOINT")
    add("--out", Rule(Path, help="the folder of the export"), required=True)
    dtype = Rule(Literal["float32", "bfloat16"], help="of the weights")
    add("--dtype", dtype, default="float32")
    size = Rule(ByteCount, minimum=1, help="of a file of weights at most")
    add("--max_shard_size", size, metavar="SIZE")
    add("--scores", Rule(Path, help="a JSON of `eval --out`, for the model card"))
    hub = Rule(str, help="upload it to the hub as well")
    add("--push_to_hub", hub, metavar="OWNER/NAME")
    _add_switch(parser, "--private", "for a repository that is made on the hub")

    add = partial(add_argument, command("sample", "Let a model write."))
    add("folder", MODEL, metavar="FOLDER")
    prompt = Rule(Text, help="what the text begins with; repeatable")
    add("--prompt", prompt, action="append", required=True)
    add("--count", Rule(int, minimum=1, help="samples of each prompt"), default=1)
    add("--tokens", Rule(int, minimum=1, unit="tokens", help="length of a sample"), default=64)
    temperature = Rule(float, minimum=1e-3, also=0, help="0 takes the likeliest token")
    add("--temperature", temperature, default=1.0)
    add("--top_k", Rule(int, minimum=1, help="draw from this many of the likeliest tokens"))
    top_p = Rule(float, above=0, maximum=1, help="draw from the fewest tokens that reach it")
    add("--top_p", top_p)
    add("--seed", SEED, default=0)


def _add_report_commands(command: AddCommand) -> None:
    add = partial(add_argument, command("plot", "Draw the curves of runs."))
    add("runs", Rule(Path, help="run folders"), nargs="+", metavar="RUN")
    add("--x", Rule(Literal["tokens", "steps", "flops", "hours"], help="x axis"), default="tokens")
    panels = Rule(Names, help="some of loss, lr, grad_norm, speed, scores")
    add("--panels", panels, default="loss,lr,grad_norm,speed,scores")
    add("--out", Rule(Path, help="the picture: .png, .svg or .pdf; else both .png and .svg"))

    text = "Write an HTML page about runs, and the same as Markdown."
    add = partial(add_argument, command("report", text))
    add("runs", Rule(Path, help="run folders"), nargs="+", metavar="RUN")
    add("--out", Rule(Path, help="the .html file; for one run by default RUN/report.html"))
    watts = Rule(float, above=0, unit="watts", help="power of a device, for the energy")
    add("--watts", watts)


def _add_eval(command: AddCommand) -> None:
    parser = command("eval", "Score a model folder with lm-eval-harness.")
    add = partial(add_argument, parser)
    add("folder", MODEL, metavar="FOLDER")
    tasks = parser.add_mutually_exclusive_group(required=True)
    add_argument(tasks, "--tasks", Rule(Names, help="what to score"))
    suite = Rule(Literal[tuple(SUITES)], help="the tasks of a recipe")
    add_argument(tasks, "--suite", suite)
    add("--include_path", INCLUDE_PATH)
    add("--limit", Rule(int, minimum=1, unit="items", help="items of each task"))
    add("--batch_size", Rule(int, minimum=1, help="contexts read at once"), default=8)
    dtype = Rule(Literal["float32", "bfloat16", "float16", "auto"], help="of the weights")
    add("--dtype", dtype, default="float32")
    add("--device", Rule(DeviceName, help="by default CUDA or MPS where there is one"))
    add("--num_fewshot", Rule(int, minimum=0, help="examples in front of each item"))
    _add_switch(parser, "--harness", "score with lm-eval's own model, slower")
    _add_switch(parser, "--log_samples", "write samples_TASK.jsonl files beside --out")
    add("--out", Rule(Path, help="where lm-eval's JSON goes"))


def _add_rest(parser: Parser, text: str) -> None:
    """Add all that stands behind RECIPE, which may be nothing."""
    flags = parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="FLAGS", help=text)
    flags.required = False  # argparse would name it among what is missing


def _add_switch(parser: Parser, name: str, text: str) -> None:
    parser.add_argument(name, action="store_true", help=text)


if __name__ == "__main__":
    main()
