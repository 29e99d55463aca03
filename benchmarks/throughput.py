"""Optimizer steps of ours and of the peers: tokens a second, peak memory, and MFU.

Every process runs one contender in one dtype; repetitions go round all of them. What each row
means stands in `README.md`.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from statistics import median

import torch
from contenders import (
    COMPILED,
    DTYPES,
    FAMILIES,
    OURS,
    PEERS,
    Trial,
    add_path_flags,
    device,
    peer_name,
    peer_paths,
    run_trial,
)
from measuring import (
    RESULTS,
    ChildFailed,
    Row,
    begin,
    build_parser,
    ready,
    run_child,
    with_eta,
    write_report,
)

from pretrain_lib.models.flops import ModelFlops, device_peak, model_flops


@dataclass(frozen=True)
class Size:
    """What is trained on a kind of device."""

    batch: int
    length: int
    steps: int
    shape: dict[str, int]


SIZES = {
    ("gpt2", "cpu"): Size(2, 1024, 3, {}),
    ("gpt2", "cuda"): Size(32, 1024, 20, {}),
    # Four layers of the 1.3B recipe.
    ("llama", "cpu"): Size(1, 1024, 3, {"num_layers": 4, "context_length": 1024}),
    ("llama", "cuda"): Size(4, 2048, 10, {}),
}
CONTENDERS = (*OURS, "transformers", "nanoGPT", f"nanoGPT{COMPILED}", "llm.c", "litgpt")
NEEDS_PATH = ("nanoGPT", "llm.c", "litgpt")
# Model, dtype, device; one of ours, a peer; which of their figures, and what is asked of its ratio.
GOALS = (
    ("gpt2", "bf16", "cpu", "ours", "nanoGPT", "speed", "ratio >= 1.4"),
    ("gpt2", "bf16", "cpu", "ours", "nanoGPT compiled", "speed", "ratio >= 1.15"),
    ("gpt2", "bf16", "cpu", "ours", "transformers", "speed", "ratio >= 1.5"),
    ("gpt2", "bf16", "cpu", "ours", "nanoGPT", "memory", "ratio <= 0.8"),
    ("gpt2", "bf16", "cpu", "ours", "nanoGPT compiled", "memory", "ratio <= 0.8"),
    ("gpt2", "bf16", "cpu", "ours leanest", "nanoGPT compiled", "memory", "ratio <= 0.6"),
    ("gpt2", "fp32", "cpu", "ours", "nanoGPT", "speed", "ratio >= 1.15"),
    ("gpt2", "fp32", "cpu", "ours", "nanoGPT compiled", "speed", "ratio >= 1.15"),
    ("gpt2", "fp32", "cpu", "ours", "transformers", "speed", "ratio >= 1.15"),
    ("llama", "bf16", "cpu", "ours", "transformers", "speed", "ratio >= 1.4"),
    ("llama", "bf16", "cpu", "ours", "transformers", "memory", "ratio <= 0.7"),
    ("gpt2", "bf16", "cuda", "ours", "nanoGPT compiled", "speed", "ratio >= 1.1"),
)
UNITS = {"speed": "tokens/s", "memory": "MB"}
HEADERS = {
    f"{dtype} {section}": text.format(dtype=dtype)
    for dtype in DTYPES
    for section, text in {
        "speed": "Optimizer steps in {dtype}: tokens a second, and times the first peer",
        "memory": "Their peak memory: MB, and times the first peer",
        "goals": "Ours against each peer in {dtype}",
    }.items()
}
Results = dict[tuple[str, str], list[dict]]  # what processes returned, by dtype and contender


def measure_steps(given: dict) -> dict:
    """Run a trial in a process of its own."""
    ready()
    return run_trial(Trial(**given))


def choose_contenders(options: argparse.Namespace) -> list[str]:
    """Return those asked for, or all that have the model and are here."""
    paths, family = peer_paths(options), options.model

    def is_here(name: str) -> bool:
        peer = peer_name(name)
        has_model = peer in PEERS and family in PEERS[peer].families
        return name in OURS or (has_model and (peer not in NEEDS_PATH or peer in paths))

    asked = options.contenders.split(",") if options.contenders else None
    for name in asked or ():
        if not is_here(name):
            known = ", ".join(filter(is_here, CONTENDERS))
            sys.exit(f"error: --contenders: {name} is not among {known}, compiled or not")
    return asked or [name for name in CONTENDERS if is_here(name)]


def build_trial(options: argparse.Namespace) -> Trial:
    """Return the trial of a run; its contender and its dtype change."""
    size = SIZES[options.model, device().type]
    shape = size.shape | ({"num_layers": options.layers} if options.layers else {})
    return Trial(
        contender="ours",
        family=options.model,
        dtype="bf16",
        batch=options.batch or size.batch,
        length=size.length,
        shape=shape,
        warmup=options.warmup,
        steps=options.steps or size.steps,
        paths=peer_paths(options),
    )


def run_in_turn(trials: list[Trial], repeat: int, minutes: float) -> Results:
    """Run all trials `repeat` times in turn; what fails is left out, and so is what has no time."""
    results: Results = {(trial.dtype, trial.contender): [] for trial in trials}
    names = [f"{trial.dtype} {trial.contender}" for trial in trials] * repeat
    progress, started = with_eta(names), time.monotonic()
    for repetition in range(repeat):
        for trial in trials:
            next(progress)
            key = trial.dtype, trial.contender
            if key not in results:
                continue
            try:
                results[key] += run_child(measure_steps, asdict(trial))
            except ChildFailed:
                del results[key]  # out of memory, say: the others go on
        if (time.monotonic() - started) * (repetition + 2) / (repetition + 1) > 60 * minutes:
            break
    return results


def rows_of(some: dict[str, list[dict]], trial: Trial, flops: ModelFlops) -> Iterator[Row]:
    """Yield the rows of a dtype: each contender against the first peer, then what has a goal."""
    figures = {name: figures_of(results, trial) for name, results in some.items()}
    base = next((name for name in some if name not in OURS), None)
    for figure, unit in UNITS.items():
        for name, own in figures.items():
            peer = figures[base][figure] if base else None
            note = note_of(figure, some[name], trial, flops)
            yield Row(f"{trial.dtype} {figure}", name, unit, own[figure], peer, note=note)
    here = (trial.family, trial.dtype, device().type)
    for *where, ours, peer, figure, goal in GOALS:
        if tuple(where) == here and ours in figures and peer in figures:
            own, other = figures[ours][figure], figures[peer][figure]
            name = f"{trial.family} {figure}: {ours} / {peer}"
            yield Row(f"{trial.dtype} goals", name, UNITS[figure], own, other, goal)


def figures_of(results: list[dict], trial: Trial) -> dict[str, list[float]]:
    """Return the speed of each process, by its median step, and its peak memory."""
    tokens = trial.batch * trial.length
    return {
        "speed": [tokens / median(result["seconds"]) for result in results],
        "memory": [result["peak_mb"] for result in results],
    }


def note_of(figure: str, results: list[dict], trial: Trial, flops: ModelFlops) -> str:
    """Return both MFUs, or the memory of the imports."""
    if figure == "memory":
        imported = median(result["imported_mb"] for result in results)
        return "" if device().type == "cuda" else f"{imported:.0f} MB after the imports"
    # A maker's peak is that of bf16; all else is measured beside the steps.
    given = device_peak(device(), torch.bfloat16) if device().type == "cuda" else None
    given = given if trial.dtype == "bf16" else None
    each = zip(figures_of(results, trial)["speed"], results, strict=True)
    used = median(speed / (given or result["matrix_rate"]) for speed, result in each)
    return f"MFU {used * flops.parameters:.1%} (6N), {used * flops.total:.1%} (+ 12LdT)"


def measure(options: argparse.Namespace, raw: list) -> Iterator[Row]:
    """Yield all rows, and fill `raw` with what the processes returned."""
    trial, names = build_trial(options), choose_contenders(options)
    dtypes = [options.dtype] if options.dtype else [*DTYPES]
    trials = [replace(trial, contender=name, dtype=dtype) for dtype in dtypes for name in names]
    results = run_in_turn(trials, options.repeat, options.minutes)
    for (dtype, name), some in results.items():
        raw += [{"contender": name, "dtype": dtype} | result for result in some]
    build_model, _ = FAMILIES[trial.family]
    with torch.device("meta"):
        flops = model_flops(build_model(trial.config), sequence_length=trial.length)
    for dtype in dtypes:
        some = {name: results[dtype, name] for name in names if (dtype, name) in results}
        yield from rows_of(some, replace(trial, dtype=dtype), flops)
    failed = [f"{t.dtype} {t.contender}" for t in trials if (t.dtype, t.contender) not in results]
    print("\nfailed, see above: " + ", ".join(failed) if failed else "")


def main() -> None:
    """Measure training steps and write the results."""
    parser = build_parser(main.__doc__, "throughput", repeat=3)
    parser.add_argument("--model", choices=FAMILIES, default="gpt2")
    parser.add_argument("--dtype", choices=DTYPES, help="(default: both)")
    parser.add_argument("--batch", type=int, help="sequences")
    parser.add_argument("--steps", type=int, help="steps that are timed, in each process")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--contenders", metavar="A,B", help="(default: all that are here)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no repetition beyond")
    parser.add_argument("--layers", type=int, help="of a smaller model, for a quick try")
    add_path_flags(parser)
    parser.set_defaults(out=None)
    options = parser.parse_args()
    name = f"throughput_{options.model}_{device().type}.json"
    options.out = options.out or RESULTS / name
    raw: list = []
    write_report(measure(options, raw), options, headers=HEADERS, raw=raw)


if __name__ == "__main__":
    begin(main)
