"""The JSON files of a checkpoint: the training state, and the manifest of the run."""

import dataclasses
import json
from typing import Any

import numpy as np

from pretrain_lib.values import check_value

HIGHEST_STEP = 10**8 - 1  # the names of checkpoints have eight digits
HIGHEST_COUNT = 2**63 - 1


def plain_values(state: Any, *, manifest: dict) -> dict:
    """Return the fields of a TrainingState, numbers of NumPy as those of Python.

    Raises ValueError for a count that is none, and for what JSON does not hold.
    """
    values = {
        name: value.item() if isinstance(value, np.generic) else value
        for name, value in dataclasses.asdict(state).items()
    }
    for field in dataclasses.fields(state):
        if field.type is int:
            highest = HIGHEST_STEP if field.name == "step" else HIGHEST_COUNT
            name = f"state.{field.name}"
            check_value(values[field.name], name, int, minimum=0, maximum=highest)
    for name, content in (("state", values), ("manifest", manifest)):
        try:
            json.dumps(content)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{name} cannot be written as JSON ({error}): give numbers, text, lists and dicts"
            ) from None
    return values
