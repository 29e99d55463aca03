"""The cases that run on the null GPU: both models, each setting that has CUDA code of its own."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """Steps of one model in one setting; documents are of 16 tokens to all of a window."""

    family: str
    batch: int
    length: int
    documents: bool = False
    compiled: bool = True
    checkpointing: str = "none"
    moments: str = "fp32"
    optimizer: str = "adamw"
    micro_batches: int = 2
    shape: dict[str, Any] = field(default_factory=dict)
    """Fields of the model's configuration that differ from its defaults."""

    def __str__(self) -> str:
        parts = [f"{self.batch} x {self.length}"]
        parts += [f"{name.removeprefix('num_')} {value}" for name, value in self.shape.items()]
        parts += ["documents"] if self.documents else []
        parts += [self.checkpointing] if self.checkpointing != "none" else []
        parts += ["Muon"] if self.optimizer == "muon" else []
        parts += ["bf16 moments"] if self.moments == "bf16" else []
        parts += ["one micro-batch"] if self.micro_batches == 1 else []
        return f"{self.family} {', '.join(parts)}, {'compiled' if self.compiled else 'eager'}"


SIZES = {"gpt2": (16, 1024), "llama": (4, 2048)}
LARGEST = {"gpt2": 320, "llama": 20}  # of eager steps, in 141 GB
GROUPED = {"num_heads": 32, "num_key_value_heads": 8}
WIDE_HEADS = {"num_heads": 16, "num_key_value_heads": 4}


def all_cases() -> list[Case]:
    """Return all cases, those of one model together."""
    return [case for family in SIZES for case in cases_of(family)]


def cases_of(family: str) -> list[Case]:
    """Return the cases of a model."""
    batch, length = SIZES[family]
    plain = asdict(Case(family, batch, length))
    changes: list[dict[str, Any]] = []
    for compiled in (False, True):
        ways: list[dict[str, Any]] = [
            {},
            {"documents": True},
            {"checkpointing": "selective"},
            {"checkpointing": "full"},
            {"checkpointing": "selective", "documents": True},
        ]
        if family == "llama":
            ways += [{"shape": GROUPED, "documents": True}, {"shape": WIDE_HEADS}]
        changes += [way | {"compiled": compiled} for way in ways]
    changes += [  # eager: what differs is not compiled, and compiling takes long
        change | {"compiled": False}
        for change in (
            {"moments": "bf16"},
            {"optimizer": "muon"},
            {"optimizer": "muon", "moments": "bf16"},
            {"micro_batches": 1},
            {"batch": 1},
            {"batch": 4 * batch, "documents": True},
            {"batch": LARGEST[family]},
        )
    ]
    return [Case(**plain | change) for change in changes]
