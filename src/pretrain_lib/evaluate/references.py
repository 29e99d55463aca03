"""Scores that others published, each with its source, read from `references.json`.

The figures are zero-shot, in lm-eval's units (shares, perplexities), under its names of tasks and
metrics. `validation/loss` is in nats per token on the GPT-2 recipe's own validation text.
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

SMALL = 500e6  # parameters: up to here a model is compared with the small ones


@dataclass(frozen=True)
class Source:
    """Where a figure was read."""

    title: str
    url: str
    note: str
    """What differs from a score that is measured now."""


@dataclass(frozen=True)
class Figure:
    """One published score of one model."""

    model: str
    task: str
    metric: str
    value: float
    shots: int
    source: Source


@cache
def figures() -> tuple[Figure, ...]:
    """Return every published figure, by model, the small ones first."""
    table = _read()
    sources = {name: Source(**source) for name, source in table["sources"].items()}
    return tuple(Figure(**row | {"source": sources[row["source"]]}) for row in table["figures"])


def models_near(parameters: int) -> list[str]:
    """Return the names of the published models that one of so many parameters is compared with."""
    sizes = _read()["models"]
    return [name for name, size in sizes.items() if (size <= SMALL) == (parameters <= SMALL)]


def find_figure(model: str, task: str, metric: str, *, shots: int = 0) -> Figure | None:
    """Return a model's published score, if there is one."""
    wanted = (model, task, metric, shots)
    found = (f for f in figures() if (f.model, f.task, f.metric, f.shots) == wanted)
    return next(found, None)


@cache
def _read() -> dict:
    path = files("pretrain_lib.evaluate") / "references.json"
    return json.loads(path.read_text(encoding="utf-8"))
