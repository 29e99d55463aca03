"""Tokens to equal loss: AdamW, Muon, and Muon on Qwen3's blocks, each with rates it was tuned for.

python benchmarks/learning.py                 # continues where it was cut; see benchmarks/README.md
python benchmarks/learning.py --only 124m     # the recipes of 124M parameters, on a GPU
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from learning_fit import report
from measuring import RESULTS, describe_run

from pretrain_lib import GPT2, GPT2Config, Llama, LlamaConfig, open_corpus, start_accelerator, train
from pretrain_lib.config.settings import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    LogConfig,
    OptimizerConfig,
    Recipe,
    RunConfig,
    ScheduleConfig,
    ValidationConfig,
)
from pretrain_lib.config.units import TokenCount
from pretrain_lib.files.writes import write_json
from pretrain_lib.models.flops import count_parameters
from pretrain_lib.run_folder.folder import open_run_folder
from pretrain_lib.run_folder.rows import read_metrics
from pretrain_lib.tuning.record import drop_checkpoints, read_loss
from pretrain_lib.tuning.scaling import BASE, EMBEDDING, MATRIX, at_width
from pretrain_lib.tuning.search import Space, Trial, find_rates, search_line

SECTIONS = ("tune", "runs", "widths", "long")
WIDTHS, SEEDS = (64, 96, 128), (1, 2, 3)
STEP_TOKENS, LENGTH, HEAD_WIDTH, LAYERS, VOCABULARY = 1024, 128, 32, 4, 2048
HORIZONS = tuple(STEP_TOKENS * steps for steps in (64, 128, 256))
LONG_HORIZONS = tuple(STEP_TOKENS * steps for steps in (512, 1024))  # at the largest size alone
# Of the rates that were tuned in shorter runs: found by halving and doubling each at 512 steps.
LONG_FACTORS = {"adamw": {BASE: 2.0}}
TUNED_TOKENS = 180 * STEP_TOKENS
COMPARED_WIDTHS = (128, 256)  # at which the best rate of the matrices is looked for
LINE_TOKENS = HORIZONS[1]  # in runs of this length
VALIDATION_TOKENS = 2**15
# Around these the finder begins; who is not tuned by default takes the rates of another.
RATES_OF = {"qwen3": "muon"}
STARTS = {
    "adamw": {BASE: 4e-3, EMBEDDING: 4e-3},
    "muon": {MATRIX: 4e-3, EMBEDDING: 1.6e-2},
    "qwen3": {MATRIX: 4e-3, EMBEDDING: 1.6e-2},
}
RECIPES = {
    "gpt2_124m": ["gpt2_124m"],
    "gpt2_124m_fast": ["gpt2_124m", "--config", "gpt2_124m_fast.yaml"],
    "qwen3_124m": ["qwen3_124m"],
}
BASE_OF_MUON = 4e-3  # norms and biases, which matter little


@dataclass(frozen=True)
class Case:
    """One run."""

    contender: str
    width: int
    tokens: int
    seed: int
    rates: tuple[tuple[str, float], ...]

    @property
    def name(self) -> str:
        rates = "_".join(f"{rate:.3g}" for _, rate in self.rates)
        return f"{self.contender}_{self.width}_{self.tokens}_{self.seed}_{rates}"


class Runs:
    """Runs cases that have not been run, and keeps what came of all of them in a file."""

    def __init__(self, out: Path, folder: Path, data: Path | None) -> None:
        self.out, self.folder, self.data = out, folder, data
        content = json.loads(out.read_text()) if out.is_file() else {}
        self.content = describe_run() | {"tuned": {}, "runs": {}} | content

    def loss(self, case: Case, *, compared: bool = False) -> float:
        """Return the validation loss of a case, in nats per token; `compared` marks it for good."""
        if case.name not in self.content["runs"]:
            started, cpu = time.monotonic(), time.process_time()
            loss, parameters = self._run(case)
            self.content["runs"][case.name] = dataclasses.asdict(case) | {
                "rates": dict(case.rates),
                "parameters": parameters,
                "loss": loss,
                "seconds": round(time.monotonic() - started, 1),
                "cpu_seconds": round(time.process_time() - cpu, 1),
                "compared": compared,
            }
            self.save()
            print(f"{time.strftime('%H:%M:%S')} {case.name}: {loss:.4f}", flush=True)
        entry = self.content["runs"][case.name]
        if compared and not entry["compared"]:
            entry["compared"] = True
            self.save()
        return entry["loss"]

    def save(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.out, self.content)

    def _run(self, case: Case) -> tuple[float, int]:
        recipe = self._recipe(case)
        folder = Path(recipe.run.dir)
        with torch.device("meta"):
            model = (GPT2 if case.contender != "qwen3" else Llama)(recipe.model)
        parameters = count_parameters(model)
        if read_loss(folder) is None:
            with (
                open_run_folder(folder, resume="auto"),
                Path(os.devnull).open("w") as null,
                contextlib.redirect_stdout(null),
            ):
                train(recipe, model, open_corpus(recipe), start_accelerator(recipe))
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
        if (loss := read_loss(folder)) is None:
            sys.exit("stopped: the same command goes on")
        drop_checkpoints(folder)
        return loss, parameters

    def _recipe(self, case: Case) -> Recipe:
        decay = TokenCount(0.6 * case.tokens)
        kind = "adamw" if case.contender == "adamw" else "muon"
        source = {"path": str(self.folder / "data"), "source": "python-stdlib"}
        source |= {"train_tokenizer": VOCABULARY}
        return Recipe(
            model=_shape(case.contender, case.width),
            data=DataConfig(**({"path": str(self.data)} if self.data else source)),
            batch=BatchConfig(
                tokens=TokenCount(STEP_TOKENS), micro_batch=8, sequence_length=LENGTH
            ),
            optimizer=OptimizerConfig(kind=kind, **{BASE: BASE_OF_MUON} | dict(case.rates)),
            schedule=ScheduleConfig(
                kind="wsd",
                tokens=TokenCount(case.tokens),
                warmup_fraction=0.1,
                decay_tokens=decay,
                final_fraction=0.0,
            ),
            run=RunConfig(dir=str(self.folder / "runs" / case.name), seed=case.seed),
            log=LogConfig(every=16),
            checkpoint=CheckpointConfig(keep_last=1),
            validation=ValidationConfig(every=10**9, tokens=TokenCount(VALIDATION_TOKENS)),
        )


def _shape(contender: str, width: int) -> GPT2Config | LlamaConfig:
    """Return a model; both kinds have 12 width^2 parameters a layer, and a tied head."""
    heads = width // HEAD_WIDTH
    common = {"vocabulary_size": VOCABULARY, "context_length": LENGTH, "num_layers": LAYERS}
    common |= {"num_heads": heads, "width": width}
    if contender != "qwen3":
        return GPT2Config(**common)
    own = {"num_key_value_heads": heads, "mlp_width": width * 8 // 3, "tied_head": True}
    return LlamaConfig(**common, **own, qk_norm=True, norm_epsilon=1e-6)


def rates_at(runs: Runs, contender: str, width: int) -> dict[str, float]:
    """Return the rates of a contender at a width, from those found at the nearest width."""
    kind = "adamw" if contender == "adamw" else "muon"
    tuned = runs.content["tuned"]
    own = tuned.get(contender, {})
    found = own if str(width) in own or contender not in RATES_OF else tuned[RATES_OF[contender]]
    nearest = min(found, key=lambda tuned: abs(math.log(int(tuned) / width)))
    rates = {BASE: BASE_OF_MUON} | found[nearest]
    return at_width(rates, kind=kind, tuned=int(nearest), wanted=width)


def tune(runs: Runs, contender: str, width: int) -> None:
    """Find the rates of a contender at a width, by the search of `pretrain tune`."""
    start = STARTS[contender]

    def evaluate(trial: Trial) -> float:
        rates = tuple(zip(start, trial.rates, strict=True))
        return runs.loss(Case(contender, width, trial.tokens, SEEDS[0], rates))

    found = find_rates(Space(tuple(start.values()), TUNED_TOKENS), evaluate)
    rates = dict(zip(start, found.trial.rates, strict=True))
    runs.content["tuned"].setdefault(contender, {})[str(width)] = rates
    runs.save()


def cases(runs: Runs, contenders: list[str]) -> Iterator[Case]:
    """Yield the runs that are compared, the largest size first."""
    for width in sorted(WIDTHS, reverse=True):
        for seed in SEEDS:
            for tokens in HORIZONS:
                for contender in contenders:
                    rates = rates_at(runs, contender, width)
                    yield Case(contender, width, tokens, seed, tuple(rates.items()))


def long_cases(runs: Runs, contenders: list[str]) -> Iterator[Case]:
    """Yield longer runs of the largest size."""
    width = max(WIDTHS)
    for tokens, seed, contender in product(LONG_HORIZONS, SEEDS, contenders):
        rates = rates_at(runs, contender, width)
        for name, factor in LONG_FACTORS.get(contender, {}).items():
            rates[name] *= factor
        yield Case(contender, width, tokens, seed, tuple(rates.items()))


def best_matrix_rate(runs: Runs, contender: str, width: int) -> float:
    """Return the best rate of the matrices at a width, all else as it was tuned.

    The rates that halving and doubling tries with one seed are run with all; the best one is the
    minimum of the parabola that fits their mean losses.
    """
    rates = rates_at(runs, contender, width)
    start = Trial((rates.get(MATRIX, rates[BASE]),), LINE_TOKENS)
    tried: set[float] = set()

    def measure(trial: Trial, seed: int = SEEDS[0]) -> float:
        tried.add(trial.rates[0])
        changed = tuple((rates | {MATRIX: trial.rates[0]}).items())
        return runs.loss(Case(contender, width, trial.tokens, seed, changed))

    search_line(start, 0, measure)
    means = [
        statistics.mean(measure(Trial((rate,), LINE_TOKENS), seed) for seed in SEEDS)
        for rate in sorted(tried)
    ]
    curvature, slope, _ = np.polyfit(np.log2(sorted(tried)), means, 2)
    return float(2 ** (-slope / (2 * curvature)))


def train_recipes(folder: Path, data: Path | None) -> None:
    """Train the recipes of 124M parameters on all GPUs, and print the losses at their ends."""
    if data is None:
        sys.exit("error: --only 124m needs --data, a folder prepared with GPT-2's tokenizer")
    if not torch.cuda.is_available():
        sys.exit("error: --only 124m needs a GPU, and torch sees none")
    command = [sys.executable, "-m", "pretrain_lib.commands.cli", "train"]
    given = ["--data.path", str(data), "--scores.tasks", "[]", "--samples.prompts", "[]"]
    for name, words in RECIPES.items():
        run = folder / name
        subprocess.run([*command, *words, *given, "--run.dir", str(run)], check=True)
        last = [row for row in read_metrics(run) if row["kind"] == "validation"][-1]
        print(f"{name}: {last['loss']:.4f} nats per token after {last['tokens']:,} tokens")


def main() -> None:
    """Run what has not been run yet, in order of worth, and report on all of it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--only", choices=[*SECTIONS, "report", "124m"], help="one section")
    parser.add_argument("--data", type=Path, help="a prepared folder; by default python-stdlib")
    names = {"nargs": "*", "choices": [*STARTS], "default": [*STARTS]}
    parser.add_argument("--tune", **names | {"default": ["adamw", "muon"]}, help="by the finder")
    parser.add_argument("--contenders", **names, help="those whose runs are compared")
    folder = Path("runs", "learning")
    parser.add_argument("--folder", type=Path, default=folder, help="where the runs are kept")
    parser.add_argument("--out", type=Path, default=RESULTS / "learning.json")
    options = parser.parse_args()
    if options.only == "124m":
        return train_recipes(options.folder, options.data)
    runs = Runs(options.out, options.folder, options.data)
    wanted = [options.only] if options.only else SECTIONS
    if "tune" in wanted:
        for width, contender in product(sorted(WIDTHS, reverse=True), options.tune):
            tune(runs, contender, width)
    if "runs" in wanted:
        for case in cases(runs, options.contenders):
            runs.loss(case, compared=True)
    if "long" in wanted:
        for case in long_cases(runs, options.contenders):
            runs.loss(case, compared=True)
    if "widths" in wanted:
        found = {width: best_matrix_rate(runs, "muon", width) for width in COMPARED_WIDTHS}
        runs.content["best_matrix_rate"] = {"muon": found}
        runs.save()
    return report(runs.content, options.out)


if __name__ == "__main__":
    sys.exit(main())
