"""Our models under lm-eval against lm-eval's own: items scored per second.

Each repetition measures all of them in turn, on the same requests. The medians are printed, all
values go to a JSON, and `README.md` says what each row means.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from measuring import Row, say, timed, with_eta, write_report
from transformers import AutoTokenizer
from transformers.utils import logging

import pretrain_lib as pl
from pretrain_lib.evaluate.live_model import LiveModel

WIDTH, HEAD_WIDTH = 768, 64  # of GPT-2 124M
CONTEXT_WORDS, ENDING_WORDS = (20, 90), (8, 40)  # of items that are made up
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GOALS = {"fp32": "ratio >= 2.5", "bf16": "ratio >= 3"}
TOLERANCE = 1e-3  # nats, in fp32
PACKAGES = ("lm_eval", "transformers", "tokenizers")

Item = list[tuple[str, str]]  # pairs of context and ending


def read_hellaswag(path: Path) -> Iterator[Item]:
    """Yield four endings of each item, as the harness's task joins its parts."""
    for line in path.read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        context = f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}".strip()
        yield [(context, f" {ending}") for ending in item["endings"]]


def read_lambada(path: Path) -> Iterator[Item]:
    """Yield each passage, and its last word to be scored."""
    for line in path.read_text(encoding="utf-8").splitlines():
        context, word = json.loads(line)["text"].rsplit(" ", 1)
        yield [(context, f" {word}")]


def make_up(endings: int, ending_words: tuple[int, int], words: list[str]) -> Iterator[Item]:
    """Yield items of words drawn at random, for want of real ones."""
    generator = random.Random(0)

    def text(lengths: tuple[int, int]) -> str:
        return " ".join(generator.choices(words, k=generator.randint(*lengths)))

    while True:
        context = text(CONTEXT_WORDS)
        yield [(context, f" {text(ending_words)}") for _ in range(endings)]


def load_items(options: argparse.Namespace) -> dict[str, list[Item]]:
    """Return the items of each task."""
    words = sorted(set(Path(argparse.__file__).read_text(encoding="utf-8").split()))
    sources = {
        "hellaswag": read_hellaswag(options.hellaswag)
        if options.hellaswag
        else make_up(4, ENDING_WORDS, words),
        "lambada": read_lambada(options.lambada) if options.lambada else make_up(1, (1, 1), words),
    }
    return {
        task: [item for item, _ in zip(items, range(options.items), strict=False)]
        for task, items in sources.items()
    }


def prepare_tokenizer(path: Path | None) -> pl.Tokenizer:
    """Return the tokenizer in a folder, or one trained on some Python."""
    if path:
        return pl.load_tokenizer(path)
    texts = [Path(module.__file__).read_text() for module in (argparse, random)]
    return pl.train_tokenizer(texts, vocabulary_size=8192)


def build_scorers(
    folder: Path, batch_sizes: dict[str, list[int]], dtype: torch.dtype
) -> dict[str, LiveModel | HFLM]:
    """Return lm-eval's own model and ours on the same weights, at every batch size."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = pl.load_pretrained(folder).to(device, dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = {"dtype": dtype, "softmax_dtype": torch.float32, "device": device}
    theirs = HFLM(pretrained=str(folder), **options)
    scorers: dict[str, LiveModel | HFLM] = {}
    for size in batch_sizes["HFLM"]:
        scorers[f"HFLM, batch {size}"] = theirs
    for size in batch_sizes["ours"]:
        scorers[f"ours, batch {size}"] = LiveModel(model, tokenizer, batch_size=size)
    return scorers


def score(scorer: LiveModel | HFLM, name: str, requests: list[Instance]) -> list:
    """Return the log-likelihoods of requests, by a scorer whose name tells its batch size."""
    if isinstance(scorer, HFLM):
        scorer.batch_size_per_gpu = int(name.split()[-1])
    found = scorer.loglikelihood(requests, disable_tqdm=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return found


def check(scores: dict[str, list], kind: str) -> str:
    """Return how far our log-likelihoods are from lm-eval's; in fp32 they have to agree."""
    found = [[nats for nats, _ in own] for own in scores.values()]
    distance = max(abs(a - b) for own in found[1:] for a, b in zip(found[0], own, strict=True))
    if kind == "fp32" and distance > TOLERANCE:
        sys.exit(f"error: log-likelihoods differ by {distance:.2e} nats: {', '.join(scores)}")
    return f"all within {distance:.1e} nats"


def measure_task(
    task: str, kind: str, scorers: dict[str, LiveModel | HFLM], items: list[Item], repeat: int
) -> Iterator[Row]:
    """Yield the rows of a task in a precision: items per second at each batch size."""
    arguments = [pair for item in items for pair in item]
    requests = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(arguments)]
    measures: dict[str, Callable[[], list]] = {
        name: partial(score, scorer, name, requests) for name, scorer in scorers.items()
    }
    note = check({name: measure() for name, measure in measures.items()}, kind)  # and warm up
    rates: dict[str, list[float]] = {name: [] for name in measures}
    for name in with_eta([*measures] * repeat):
        rates[name].append(len(items) / timed(measures[name]))
    best = {side: best_of(rates, side) for side in ("HFLM", "ours")}
    for name, own in rates.items():
        goal = GOALS[kind] if task == "hellaswag" and name == best["ours"] else ""
        mark = "best of HFLM; " * (name == best["HFLM"])
        yield Row(f"{task}, {kind}", name, "items/s", own, rates[best["HFLM"]], goal, mark + note)


def best_of(rates: dict[str, list[float]], side: str) -> str:
    """Return the fastest batch size of a side."""
    names = [name for name in rates if name.startswith(side)]
    return max(names, key=lambda name: median(rates[name]))


def measure(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Yield all rows."""
    say("building the model")
    tokenizer, items = prepare_tokenizer(options.tokenizer), load_items(options)
    config = pl.GPT2Config(
        vocabulary_size=tokenizer.vocabulary_size,
        width=options.width,
        num_heads=options.width // HEAD_WIDTH,
    )
    pl.save_pretrained(pl.GPT2(config).initialize(0), folder, tokenizer=tokenizer)
    batch_sizes = {"HFLM": options.hflm_batch_sizes, "ours": options.batch_sizes}
    for kind, dtype in DTYPES.items():
        scorers = build_scorers(folder, batch_sizes, dtype)
        for task, some in items.items():
            yield from measure_task(task, kind, scorers, some, options.repeat)


def parse_arguments() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path(__file__).parent / "results" / "evaluation.json")
    add("--repeat", type=int, default=3)
    add("--items", type=int, default=96, help="of each task")
    add("--hellaswag", type=Path, help="its validation items, .jsonl (default: made up)")
    add("--lambada", type=Path, help="its passages as `text`, .jsonl (default: made up)")
    add("--tokenizer", type=Path, help="a folder (default: a BPE of 8,192 trained on some Python)")
    add("--width", type=int, default=WIDTH, help="of the model, a multiple of 64")
    add("--batch_sizes", type=int, nargs="+", default=[4, 8], help="of ours")
    add("--hflm_batch_sizes", type=int, nargs="+", default=[4, 8, 16])
    return parser.parse_args()


def main() -> None:
    """Measure scoring and write the results."""
    options = parse_arguments()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with TemporaryDirectory() as folder:
        write_report(measure(options, Path(folder)), options, headers={}, packages=PACKAGES)


if __name__ == "__main__":
    main()
