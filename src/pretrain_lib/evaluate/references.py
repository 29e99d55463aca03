"""Published scores of other models, each with its source, read from `references.json`.

The scores are zero-shot, in lm-eval's units (fractions, perplexities), with its task and metric
names. `validation/loss` is in nats per token on the held-out set of the GPT-2 recipe.
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

SMALL = 500e6  # parameters; models up to this size are compared with each other


@dataclass(frozen=True)
class Source:
    """The source of a published score."""

    title: str
    url: str
    note: str
    """How its setup differs from that of scores measured here."""


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
    """Return all published scores, grouped by model, small models first."""
    table = _read()
    sources = {name: Source(**source) for name, source in table["sources"].items()}
    return tuple(Figure(**row | {"source": sources[row["source"]]}) for row in table["figures"])


def models_near(parameters: int) -> list[str]:
    """Return the published models with which a model of `parameters` parameters is compared."""
    sizes = _read()["models"]
    return [name for name, size in sizes.items() if (size <= SMALL) == (parameters <= SMALL)]


def find_figure(model: str, task: str, metric: str, *, shots: int = 0) -> Figure | None:
    """Return a model's published score, or None."""
    wanted = (model, task, metric, shots)
    matches = (f for f in figures() if (f.model, f.task, f.metric, f.shots) == wanted)
    return next(matches, None)


@cache
def _read() -> dict:
    path = files("pretrain_lib.evaluate") / "references.json"
    return json.loads(path.read_text(encoding="utf-8"))
