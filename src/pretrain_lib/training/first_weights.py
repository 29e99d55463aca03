"""The initial weights of a new run: random, or from a Hugging Face model folder."""

import json
from dataclasses import asdict
from pathlib import Path

from pretrain_lib.config.settings import Recipe
from pretrain_lib.models.hf import Model, check_weights, load_weights
from pretrain_lib.models.hf_config import read_config

# Fields that may differ from the folder, because its weights are valid for any value of them.
FREE_FIELDS = ("dropout", "vocabulary_multiple")


def set_first_weights(config: Recipe, model: Model, *, has_weights: bool) -> None:
    """Load the weights of `run.initial_weights`, or initialize a model that has none.

    A model with weights keeps them if `run.initial_weights` is not set. Of a sharded model, only
    the local shards are filled.
    """
    if config.run.initial_weights is not None:
        check_first_weights(config)
        load_weights(model, Path(config.run.initial_weights).expanduser())
    elif not has_weights:
        model.initialize(config.run.seed)


def check_first_weights(config: Recipe) -> None:
    """Raise ValueError if the folder of `run.initial_weights` does not match the recipe's model."""
    name = config.run.initial_weights
    if name is None:
        return
    if config.run.resume not in ("auto", "never"):
        raise ValueError(
            f"run.initial_weights={name} and run.resume={config.run.resume} both say where to "
            f"begin: give one of them"
        )
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ValueError(f"run.initial_weights={name} is no folder: give one with config.json")
    theirs = read_config(folder)
    check_weights(folder)
    kinds = [type(one).__name__.removesuffix("Config") for one in (theirs, config.model)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"run.initial_weights={name} is a {kinds[0]}, the recipe trains a {kinds[1]}: take the "
            f"recipe of the other"
        )
    ours, given = asdict(config.model), asdict(theirs)
    differ = [key for key in given if key not in FREE_FIELDS and given[key] != ours[key]]
    if differ:
        found = ", ".join(f"model.{key}={ours[key]}" for key in differ)
        flags = " ".join(f"--model.{key} {_flag(given[key])}" for key in differ)
        raise ValueError(
            f"run.initial_weights={name} holds another model than {found}: give {flags}"
        )


def _flag(value: object) -> str:
    """Format a value as a command-line argument, quoted for the shell."""
    if value is not None and not isinstance(value, dict):
        return str(value)
    return f"'{json.dumps(value)}'"
