"""What Accelerate and our step add to a bare loop: on a model so small that nothing else counts.

What each row means stands in `README.md`.
"""

import argparse
from collections.abc import Callable, Iterator
from statistics import median

import torch
from accelerate import Accelerator
from contenders import CLIP, LEARNING_RATE, device
from measuring import Row, begin, build_parser, ready, run_child, timed, write_report

from pretrain_lib.models.gpt2 import GPT2, GPT2Config
from pretrain_lib.optim.groups import build_adamw
from pretrain_lib.training.step import train_step

SHAPE = GPT2Config(vocabulary_size=64, context_length=8, num_layers=1, num_heads=1, width=8)
STEPS, WARMUP = 400, 100
STEP_SECONDS = 2**19 / 600_000  # of GPT-2 124M at 600,000 tokens a second
GOAL = f"value < {1000 * STEP_SECONDS * 0.01:.2f}"  # 1 % of it
BARE, OURS = "bare loop", "ours"


def build_ours(batch: dict[str, torch.Tensor]) -> Callable[[], float]:
    """Return a step as recipes make it."""
    accelerator = Accelerator()
    model = GPT2(SHAPE).initialize(0).to(accelerator.device)
    prepared = accelerator.prepare(model, build_adamw(model, learning_rate=LEARNING_RATE))
    options = {"learning_rate": LEARNING_RATE, "max_grad_norm": CLIP, "seed": 0, "step": 0}
    return lambda: train_step(accelerator, *prepared, [batch], **options).loss


def build_bare(batch: dict[str, torch.Tensor]) -> Callable[[], float]:
    """Return the same step in plain PyTorch."""
    model = GPT2(SHAPE).initialize(0).to(device())
    optimizer = build_adamw(model, learning_rate=LEARNING_RATE)

    def step() -> float:
        loss, count = model(**batch)
        loss = loss / count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def measure_both() -> dict[str, float]:
    """Return the median milliseconds of a step of each, step by step in turn."""
    ids = torch.randint(SHAPE.vocabulary_size, (1, SHAPE.context_length), device=device())
    batch = {"input_ids": ids, "targets": ids}
    steps = {BARE: build_bare(batch), OURS: build_ours(batch)}
    ready()
    seconds = {name: [] for name in steps}
    for _ in range(WARMUP + STEPS):
        for name, step in steps.items():
            seconds[name].append(timed(step))
    return {name: 1000 * median(values[WARMUP:]) for name, values in seconds.items()}


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Yield all rows."""
    results = [run_child(measure_both)[0] for _ in range(options.repeat)]
    for name in (BARE, OURS):
        yield Row("steps", name, "ms", [result[name] for result in results])
    added = [result[OURS] - result[BARE] for result in results]
    yield Row("steps", "added to a step", "ms", added, goal=GOAL)


def main() -> None:
    """Measure what our step adds and write the results."""
    options = build_parser(main.__doc__, f"overhead_{device().type}").parse_args()
    headers = {"steps": "A step of a tiny model: milliseconds"}
    write_report(measure(options), options, headers=headers)


if __name__ == "__main__":
    begin(main)
