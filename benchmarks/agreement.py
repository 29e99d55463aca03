"""Our models under lm-eval against plain `lm_eval --model hf`: the same scores, item by item?

Log-likelihoods in fp32 have to be within 1e-3 nats, and so do the choices wherever another ending
is further behind than that; otherwise the exit status is 1. `README.md` says what each row means.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client

import lm_eval  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from measuring import PACKAGES, Row, say, write_report  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from transformers.utils import logging  # noqa: E402

from pretrain_lib.evaluate.harness import evaluate_folder  # noqa: E402
from pretrain_lib.evaluate.results import write_results  # noqa: E402
from pretrain_lib.quiet import without_foreign_progress  # noqa: E402

# Each task's own definition below lm_eval/tasks, and the split that is scored.
STOCK = {
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation"),
    "lambada": ("lambada/lambada_openai.yaml", "test"),
}
TOLERANCE = 1e-3  # nats, in fp32
MICRO = 1e-6  # nats
PER_TOKEN_ITEMS = 200

Samples = dict[int, dict]  # by the number of the item
Results = tuple[dict[str, Samples], dict[str, dict]]  # of each task: samples, metrics


# Scoring


def write_tasks(folder: Path, data: dict[str, Path]) -> list[str]:
    """Write lm-eval's own tasks with local data and return their names."""
    for task, path in data.items():
        stock, split = STOCK[task]
        config = {
            "include": str(Path(lm_eval.__file__).parent / "tasks" / stock),
            "task": f"{task}_local",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {split: str(path.resolve())},
                "cache_dir": str(folder / "cache"),
            },
            "training_split": None,
        }
        (folder / f"{task}_local.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return [f"{task}_local" for task in data]


def score_with_ours(
    tasks: list[str], folder: Path, dtype: str, options: argparse.Namespace
) -> Path:
    """Return where our scorer's results are."""
    out = folder / f"ours_{dtype}"
    with without_foreign_progress():
        results = evaluate_folder(
            options.model,
            tasks,
            include_path=folder,
            limit=options.items,
            batch_size=options.batch_size,
            dtype=dtype,
            device="cpu",
            log_samples=True,
        )
    write_results(results, out / "results.json")
    return out


def score_with_cli(tasks: list[str], folder: Path, dtype: str, options: argparse.Namespace) -> Path:
    """Return where the results of lm-eval's command line are, run in a process of its own."""
    out = folder / f"cli_{dtype}"
    model = f"pretrained={options.model.resolve()},dtype={dtype}"
    # Log-likelihoods in bf16 would be multiples of a half, or of a whole nat.
    model += ",softmax_dtype=float32" if dtype != "float32" else ""
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", model]
    command += ["--tasks", ",".join(tasks), "--include_path", str(folder), "--device", "cpu"]
    command += ["--batch_size", str(options.batch_size), "--output_path", str(out), "--log_samples"]
    command += ["--limit", str(options.items)] if options.items else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return out


def read_results(folder: Path, tasks: Sequence[str]) -> Results:
    """Return what lm-eval has written: the samples and the metrics of each task."""
    samples = {}
    for task in tasks:
        path = next(folder.rglob(f"samples_{task}*.jsonl"))
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        samples[task] = {row["doc_id"]: row for row in rows}
    path = next(folder.rglob("results*.json"))
    return samples, json.loads(path.read_text(encoding="utf-8"))["results"]


# Comparing


def scores_of(sample: dict) -> list[tuple[float, bool]]:
    """Return the log-likelihood in nats of each ending, and whether it is greedy."""
    return [(float(nats), greedy == "True") for ((nats, greedy),) in sample["resps"]]


def lead(ours: list[float], theirs: list[float], lengths: list[int]) -> float:
    """Return how many nats their choice leads ours by, in their scores; 0 if it is the same.

    Log-likelihoods are divided by the lengths before the largest is chosen.
    """
    own, peer = (
        max(range(len(lengths)), key=lambda i: nats[i] / lengths[i]) for nats in (ours, theirs)
    )
    return theirs[peer] - theirs[own] * lengths[peer] / lengths[own]


def ending_lengths(sample: dict, metric: str) -> list[int]:
    """Return what a metric divides by: nothing, or the characters of each ending."""
    endings = [arguments["arg_1"] for arguments in sample["arguments"].values()]
    return [len(ending) - 1 if metric == "acc_norm" else 1 for ending in endings]  # less the space


def compare_scores(
    section: str, ours: Samples, theirs: Samples, *, promised: bool
) -> Iterator[Row]:
    """Yield how far log-likelihoods are apart, and on how many greedy flags both differ."""
    pairs = []
    for number, sample in theirs.items():
        if ours[number]["arguments"] != sample["arguments"]:
            sys.exit(f"error: {section}: item {number} is not the same text on both sides")
        pairs += zip(scores_of(ours[number]), scores_of(sample), strict=True)
    distances = [abs(own[0] - peer[0]) / MICRO for own, peer in pairs]
    flags = sum(own[1] != peer[1] for own, peer in pairs)
    note = f"{len(theirs)} items, {len(pairs)} log-likelihoods"
    goal = f"value < {TOLERANCE / MICRO:.0f}" if promised else ""
    yield Row(section, "largest difference", "µnat", [max(distances)], None, goal, note)
    yield Row(section, "mean difference", "µnat", [sum(distances) / len(distances)])
    none = "value < 1" if promised else ""
    note = f"{sum(greedy for _, (_, greedy) in pairs)} are greedy for lm-eval"
    yield Row(section, "greedy flags that differ", "endings", [flags], None, none, note)


def compare_choices(
    section: str, metric: str, ours: Samples, theirs: Samples, *, promised: bool
) -> Iterator[Row]:
    """Yield on how many items both choose differently, and on how many not by a hair."""
    leads = []
    for number, sample in theirs.items():
        own, peer = ([nats for nats, _ in scores_of(s)] for s in (ours[number], sample))
        if distance := lead(own, peer, ending_lengths(sample, metric)):
            leads.append(distance)
    beyond = sum(distance > TOLERANCE for distance in leads)
    note = f"the largest margin is {max(leads) / MICRO:,.1f} µnat" if leads else ""
    goal = "value < 1" if promised else ""
    yield Row(section, f"{metric}: other choices", "items", [len(leads)], None, "", note)
    yield Row(section, f"{metric}: beyond the tolerance", "items", [beyond], None, goal)


def compare_metrics(section: str, ours: dict, theirs: dict) -> Iterator[Row]:
    """Yield the aggregated metrics of both."""
    for key, value in theirs.items():
        metric, _, kind = key.partition(",")
        if kind and not metric.endswith("_stderr"):
            yield Row(section, metric, "", [ours[key]], None, "", f"lm-eval: {value:.6g}")


def compare(dtype: str, ours: Results, theirs: Results) -> Iterator[Row]:
    """Yield the rows of all tasks in a dtype; the promise is on float32 alone."""
    promised = dtype == "float32"
    for task, samples in theirs[0].items():
        section = f"{task}, {dtype}"
        own = ours[0][task]
        yield from compare_scores(section, own, samples, promised=promised)
        for metric in ("acc", "acc_norm"):
            if len(next(iter(samples.values()))["resps"]) > 1:
                yield from compare_choices(section, metric, own, samples, promised=promised)
        yield from compare_metrics(section, ours[1][task], theirs[1][task])


# The accuracy per token


@torch.no_grad()
def mean_nats_in_float64(model: torch.nn.Module, context: list[int], endings: list) -> list[tuple]:
    """Return the sum and the mean of the log-likelihoods of each ending's tokens."""
    found = []
    for ending in endings:
        ids = torch.tensor([context + ending])[:, -model.config.max_position_embeddings - 1 :]
        nats = model(ids[:, :-1]).logits[0, -len(ending) :].log_softmax(dim=-1)
        own = nats.gather(1, torch.tensor(ending)[:, None])
        found.append((float(own.sum()), float(own.mean())))
    return found


def check_per_token(samples: Samples, options: argparse.Namespace) -> Iterator[Row]:
    """Yield how often our `acc_norm_per_token` differs from one by transformers in float64."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float64).eval()
    other, hits, distances = 0, 0, []
    numbers = sorted(samples)[:PER_TOKEN_ITEMS]
    for number in numbers:
        sample = samples[number]
        pairs = [(part["arg_0"], part["arg_1"]) for part in sample["arguments"].values()]
        context = tokenizer.encode(pairs[0][0])
        endings = [tokenizer.encode(start + end)[len(context) :] for start, end in pairs]
        found = mean_nats_in_float64(model, context, endings)
        best = max(range(len(found)), key=lambda i: found[i][1])
        hit = best == int(sample["doc"]["label"])
        hits += hit
        other += hit != sample["acc_norm_per_token"]
        scores = zip(found, scores_of(sample), strict=True)
        distances += [abs(exact - own) / MICRO for (exact, _), (own, _) in scores]
    section, note = "hellaswag_local, acc_norm_per_token", f"{len(numbers)} items"
    own = sum(samples[number]["acc_norm_per_token"] for number in numbers) / len(numbers)
    yield Row(section, "largest difference", "µnat", [max(distances)], None, "value < 1000", note)
    yield Row(section, "right in one of both only", "items", [other], None, "value < 1")
    peer = hits / len(numbers)
    yield Row(section, "acc_norm_per_token", "", [own], None, "", f"in float64: {peer:.6g}")


def measure(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Yield all rows."""
    tasks = write_tasks(folder, {"hellaswag": options.hellaswag, "lambada": options.lambada})
    for dtype in options.dtypes:
        say(f"scoring with ours in {dtype}")
        ours = read_results(score_with_ours(tasks, folder, dtype, options), tasks)
        say(f"scoring with lm_eval --model hf in {dtype}")
        theirs = read_results(score_with_cli(tasks, folder, dtype, options), tasks)
        yield from compare(dtype, ours, theirs)
        if dtype == "float32":
            say("scoring with transformers in float64")
            yield from check_per_token(ours[0]["hellaswag_local"], options)


def parse_arguments() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="a folder: a checkpoint or an export")
    add("--hellaswag", type=Path, required=True, help="its validation items, .jsonl")
    add("--lambada", type=Path, required=True, help="its passages as `text`, .jsonl")
    add("--items", type=int, help="the first of each task (default: all)")
    add("--dtypes", nargs="+", default=["float32", "bfloat16"], help="what both compute in")
    add("--batch_size", type=int, default=8)
    add("--out", type=Path, default=Path(__file__).parent / "results" / "agreement.json")
    return parser.parse_args()


def main() -> None:
    """Compare scores and write the results; exit 1 if they do not agree."""
    options = parse_arguments()
    logging.disable_progress_bar()
    with TemporaryDirectory() as folder:
        rows = measure(options, Path(folder))
        packages = (*PACKAGES, "lm_eval", "tokenizers")
        missed = write_report(rows, options, headers={}, packages=packages)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
