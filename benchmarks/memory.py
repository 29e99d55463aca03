"""What `--plan` says of a step's memory against what the step takes.

Every process makes a few steps of one model in one setting. What each row means stands in
`README.md`.
"""

import argparse
import gc
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from statistics import median

import torch
from contenders import FAMILIES, Trial, device, peak_memory, start_memory
from measuring import Row, begin, build_parser, ready, run_child, with_eta, write_report

from pretrain_lib.plan.memory import estimate_memory
from pretrain_lib.plan.step import Step

STEPS = 2  # the moments are there from the second on
BATCHES = {"gpt2": (1, 2), "llama": (1,)}  # on a CPU
BATCH_ON_CUDA = 8
SHAPES = {
    ("gpt2", "cpu"): {},
    ("gpt2", "cuda"): {},
    # Three layers of the 1.3B recipe.
    ("llama", "cpu"): {"num_layers": 3, "context_length": 1024},
    ("llama", "cuda"): {"context_length": 1024},
}
TINY = {
    "gpt2": {"vocabulary_size": 64, "num_layers": 1, "num_heads": 1, "width": 32},
    "llama": {
        "vocabulary_size": 64,
        "num_layers": 1,
        "num_heads": 1,
        "num_key_value_heads": 1,
        "width": 32,
        "mlp_width": 32,
    },
}
HEADERS = {
    "gpt2": "GPT-2 124M: MB as estimated, and times what was measured",
    "llama": "LLaMA at the width of the 1.3B recipe: the same",
    "goals": "How far the estimate is off at most",
}


@dataclass(frozen=True)
class Setting:
    """What of a step's settings counts for memory."""

    family: str
    dtype: str
    batch: int
    activation_checkpointing: str
    moments: str
    length: int = 1024

    @property
    def trial(self) -> Trial:
        """The model and batch as the other benchmarks name them."""
        shape = SHAPES[self.family, device().type]
        return Trial("ours", self.family, self.dtype, self.batch, self.length, shape)

    def __str__(self) -> str:
        return (
            f"{self.batch} x {self.length}, {self.dtype}, activation checkpointing "
            f"{self.activation_checkpointing}, moments {self.moments}"
        )


def measure_step(given: dict) -> float:
    """Return the MB by which steps of a model make a process grow.

    A step of a tiny model comes before, in which libraries load what they need: that, the
    interpreter and torch are no part of a step's memory.
    """
    setting = Setting(**given)
    where, trial = device(), setting.trial
    tiny = replace(trial, length=8, shape=TINY[trial.family])
    ready()
    make_steps(tiny, setting, where)
    gc.collect()
    before = start_memory(where)
    make_steps(trial, setting, where)
    return peak_memory(where) - before


def make_steps(trial: Trial, setting: Setting, where: torch.device) -> None:
    """Build a model and make steps of it on random tokens."""
    import ours

    changes = {
        "system.activation_checkpointing": setting.activation_checkpointing,
        "system.compile": False,
        "optimizer.moments": setting.moments,
    }
    step = ours.build(trial, changes)
    for _ in range(STEPS):
        ids = torch.randint(trial.config.vocabulary_size, (trial.batch, trial.length + 1))
        ids = ids.to(where)
        step(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def estimate(setting: Setting) -> float:
    """Return the MB that the plan says."""
    with torch.device("meta"):
        model = FAMILIES[setting.family][0](setting.trial.config)
    step = Step(
        sequences=setting.batch,
        length=setting.length,
        precision=setting.dtype,
        activation_checkpointing=setting.activation_checkpointing,
        moments=setting.moments,
        on_cuda=device().type == "cuda",
    )
    return estimate_memory(model, step).peak / 1e6


def settings_of(family: str) -> list[Setting]:
    """Return all settings of a model that are measured."""
    batches = (BATCH_ON_CUDA,) if device().type == "cuda" else BATCHES[family]
    recomputes = ("none", "selective", "full")
    chosen = [
        *product(("bf16",), batches, recomputes, ("fp32",)),
        *product(("fp32",), batches[:1], recomputes, ("fp32",)),
        *product(("bf16", "fp32"), batches[:1], ("full",), ("bf16",)),
    ]
    return [Setting(family, *rest) for rest in chosen]


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows of both models, then how far each is off at most."""
    settings = [s for family in options.models.split(",") for s in settings_of(family)]
    progress = with_eta([f"{s.family} {s}" for s in settings for _ in range(options.repeat)])
    worst: dict[str, tuple[float, str]] = {}
    for setting in settings:
        measured = [
            run_child(measure_step, asdict(setting))[0]
            for _, _ in zip(range(options.repeat), progress, strict=False)
        ]
        row = Row(setting.family, str(setting), "MB", [estimate(setting)] * len(measured), measured)
        row.note = f"measured {median(measured):,.0f} MB"
        worst[setting.family] = max(
            worst.get(setting.family, (0.0, "")), (100 * abs(row.ratio - 1), row.name)
        )
        yield row
    for family, (deviation, name) in worst.items():
        label = f"{family}: estimated peak against measured"
        yield Row("goals", label, "%", [deviation], goal="value < 10", note=name)


def main() -> None:
    """Measure the memory of steps, hold the estimate against it, and write the results."""
    parser = build_parser(main.__doc__, f"memory_{device().type}", repeat=1)
    parser.add_argument("--models", default="gpt2,llama", help="(default: both)")
    options = parser.parse_args()
    # Else glibc keeps up to a tenth of what was freed, to use it again.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**17))
    write_report(measure(options), options, headers=HEADERS)


if __name__ == "__main__":
    begin(main)
