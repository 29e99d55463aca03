"""How a step's time and memory grow with sequence length, batch, layers and vocabulary.

One of them is doubled at a time from a small base. Every process runs ours or transformers at one
size; repetitions go round all of them. What each row means stands in `README.md`.
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict, replace
from statistics import median

from contenders import DTYPES, Trial, device
from measuring import Row, begin, build_parser, in_turn, run_child, write_report
from throughput import measure_steps

OURS, PEER = "ours", "transformers"
SHAPE = {"num_layers": 2, "num_heads": 4, "width": 256, "vocabulary_size": 4096}
BATCH, LENGTH, CONTEXT = 4, 256, 4096  # the base, and how long sequences may become
AXES = {"length": LENGTH, "batch": BATCH, "num_layers": 2, "vocabulary_size": 4096}
LINEAR = "ratio <= 1.1"  # ours may grow by a tenth more than the peer at a doubling


def label(axis: str, value: int) -> str:
    """Return what a size is called; the base is measured once for all of them."""
    return "base" if value == AXES[axis] else f"{axis} {value}"


def build_trial(contender: str, axis: str, value: int, options: argparse.Namespace) -> Trial:
    """Return the base with one of its sizes changed."""
    shape = SHAPE | {"context_length": CONTEXT}
    trial = Trial(contender, "gpt2", options.dtype, BATCH, LENGTH, shape, steps=options.steps)
    if axis in shape:
        return replace(trial, shape=shape | {axis: value})
    return replace(trial, **{axis: value})


def measure_size(trial: Trial) -> dict[str, float]:
    """Return the seconds of a step, and by how many MB the process grew beyond its imports."""
    result = run_child(measure_steps, asdict(trial))[0]
    base = result["imported_mb"] if result["device"] == "cpu" else 0.0
    return {"seconds": median(result["seconds"]), "memory": result["peak_mb"] - base}


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Yield all rows."""
    sizes = {
        axis: [base << doubling for doubling in range(options.doublings + 1)]
        for axis, base in AXES.items()
        if options.only in (None, axis)
    }
    trials = {
        f"{label(axis, value)} {name}": build_trial(name, axis, value, options)
        for axis, values in sizes.items()
        for value in values
        for name in (OURS, PEER)
    }
    measures = {name: lambda trial=trial: measure_size(trial) for name, trial in trials.items()}
    results = in_turn(measures, options.repeat)
    for figure, unit in (("seconds", "s"), ("memory", "MB")):
        yield from rows_of(figure, unit, sizes, results)


def rows_of(
    figure: str, unit: str, sizes: dict[str, list[int]], results: dict[str, list]
) -> Iterator[Row]:
    """Yield the rows of a figure: at each size, and its growth at each doubling."""

    def values(axis: str, value: int, name: str) -> list[float]:
        return [result[figure] for result in results[f"{label(axis, value)} {name}"]]

    for axis, steps in sizes.items():
        for value in steps:
            own, peer = (values(axis, value, name) for name in (OURS, PEER))
            yield Row(figure, f"{axis} {value}", unit, own, peer)
    for axis, steps in sizes.items():
        for before, after in zip(steps, steps[1:], strict=False):
            own, peer = (
                [b / a for a, b in zip(*(values(axis, v, n) for v in (before, after)), strict=True)]
                for n in (OURS, PEER)
            )
            name, note = f"{axis} {before} to {after}", f"{median(peer):.2f} x for {PEER}"
            yield Row(f"{figure} growth", name, "x", own, peer, LINEAR, note)


HEADERS = {
    "seconds": "A step of ours: seconds, and times transformers",
    "seconds growth": "By how many times it takes longer at each doubling, and times transformers'",
    "memory": "Its memory beyond the imports: MB at most, and times transformers",
    "memory growth": "By how many times it takes more at each doubling, and times transformers'",
}


def main() -> None:
    """Measure how a step grows and write the results."""
    parser = build_parser(main.__doc__, f"scaling_{device().type}", repeat=3)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--doublings", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=5, help="steps that are timed, in each process"
    )
    parser.add_argument("--only", choices=AXES)
    options = parser.parse_args()
    write_report(measure(options), options, headers=HEADERS)


if __name__ == "__main__":
    begin(main)
