"""The initial weights of a new run: random, or from a Hugging Face model folder."""

import json
import re
from dataclasses import asdict
from pathlib import Path

from pretrain_lib.checkpoint.folders import find_newest, still_there
from pretrain_lib.config.settings import Recipe
from pretrain_lib.models.any_model import load_weights
from pretrain_lib.models.hf_config import read_config
from pretrain_lib.models.interface import Model
from pretrain_lib.models.transformers_config import NOT_THE_SHAPE, CausalLMConfig
from pretrain_lib.models.weight_files import check_weights
from pretrain_lib.run_folder.layout import CHECKPOINTS, is_run_folder
from pretrain_lib.wording import in_line, without_queries

# Fields that may differ from the folder, because its weights are valid for any value of them.
FREE_FIELDS = ("dropout", "vocabulary_multiple")
HF_FREE_FIELDS = (*NOT_THE_SHAPE, "use_cache", "initializer_range", "output_router_logits")


HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")  # OWNER/NAME, or the name of an old model


def set_first_weights(config: Recipe, model: Model, *, has_weights: bool) -> None:
    """Load the weights of `run.initial_weights`, or initialize a model that has none.

    A model with weights keeps them if `run.initial_weights` is not set. Of a sharded model, only
    the local shards are filled.
    """
    if config.run.initial_weights is not None:
        folder = find_weights(config.run.initial_weights)
        with still_there(folder):
            check_first_weights(config)
            load_weights(model, folder)
    elif not has_weights:
        model.initialize(config.run.seed)


def find_weights(name: str) -> Path:
    """Return a folder of weights by its path, or by a name on the Hub, from which it is fetched.

    Raises ValueError if there is neither.
    """
    folder = Path(name).expanduser()
    if is_run_folder(folder):
        newest = find_newest(folder / CHECKPOINTS)
        raise ValueError(
            f"run.initial_weights={name} is a run folder, whose newest checkpoint changes: give "
            f"{'a model folder' if newest is None else newest}"
        )
    if folder.is_dir():
        return folder
    if not HUB_NAME.fullmatch(name):
        raise ValueError(f"run.initial_weights={name} is no folder: give one with config.json")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (ValueError, OSError) as error:
        reason = without_queries(in_line(error))
        raise ValueError(
            f"run.initial_weights={name} is no folder, and the Hugging Face Hub has no such model "
            f"within reach ({reason}): give a folder with config.json, or a name on the hub"
        ) from error


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
    folder = find_weights(name)
    if isinstance(config.model, CausalLMConfig):
        theirs = CausalLMConfig(config=str(folder))
        check_weights(folder)
        _check_same_family(name, config.model.hf.to_dict(), theirs.hf.to_dict())
        return
    theirs = read_config(folder)
    check_weights(folder)
    kinds = [type(one).__name__.removesuffix("Config") for one in (theirs, config.model)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"run.initial_weights={name} is a {kinds[0]}, the recipe trains a {kinds[1]}: take the "
            f"recipe of the other"
        )
    ours, stored = asdict(config.model), asdict(theirs)
    differ = [key for key in stored if key not in FREE_FIELDS and stored[key] != ours[key]]
    if differ:
        settings = ", ".join(f"model.{key}={ours[key]}" for key in differ)
        flags = " ".join(f"--model.{key} {_flag(stored[key])}" for key in differ)
        raise ValueError(
            f"run.initial_weights={name} holds another model than {settings}: give {flags}"
        )


def _check_same_family(name: str, ours: dict, given: dict) -> None:
    """Raise ValueError if two configurations of transformers describe different models."""
    names = sorted(key for key in ours.keys() | given.keys() if not _is_free(key))
    differ = [key for key in names if ours.get(key) != given.get(key)]
    if differ:
        settings = ", ".join(f"{key}={ours.get(key)}, not {given.get(key)}" for key in differ)
        raise ValueError(
            f"run.initial_weights={name} holds another model than model.config, which has "
            f"{settings}: give --model.config {name}"
        )


def _is_free(key: str) -> bool:
    """Return whether the weights of a folder are valid for any value of a field of its config."""
    return key in HF_FREE_FIELDS or "dropout" in key or key.endswith("_token_id")


def _flag(value: object) -> str:
    """Format a value as a command-line argument, quoted for the shell."""
    if value is not None and not isinstance(value, dict):
        return str(value)
    return f"'{json.dumps(value)}'"
