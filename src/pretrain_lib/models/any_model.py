"""Functions for every kind of model: build it, save and load its folder, create its cache.

GPT-2 and LLaMA are read and written by `hf`, all others by transformers (`transformers_folder`).
"""

from dataclasses import fields
from pathlib import Path

import torch

from pretrain_lib.data.text.tokenizer import Tokenizer
from pretrain_lib.models import hf, transformers_folder
from pretrain_lib.models.adapter import CausalLMAdapter, build_adapter
from pretrain_lib.models.blocks import ActivationCheckpointing
from pretrain_lib.models.cache import KeyValueCache
from pretrain_lib.models.gpt2 import GPT2Config
from pretrain_lib.models.hf_config import read_config, read_hf_config
from pretrain_lib.models.interface import Model, saved_tensors, unwrap
from pretrain_lib.models.llama import LlamaConfig
from pretrain_lib.models.transformers_cache import TransformersCache
from pretrain_lib.models.transformers_config import CausalLMConfig
from pretrain_lib.models.transformers_family import check_causal, check_documents, runs_with_cache
from pretrain_lib.models.weight_files import (
    WEIGHT_DTYPES,
    replacing_model,
    split_by_size,
    weight_file,
    write_index,
    write_sorted_json,
    write_weights,
)
from pretrain_lib.tensors.files import stored_dtype

ModelConfig = GPT2Config | LlamaConfig | CausalLMConfig


def build_model(config: ModelConfig) -> Model:
    """Build a model from its configuration."""
    if isinstance(config, CausalLMConfig):
        return build_adapter(config)
    return hf.build_model(config)


def check_model(config: ModelConfig, *, document_masking: bool) -> None:
    """Raise ValueError for a model that cannot be trained so."""
    if isinstance(config, CausalLMConfig):
        check_causal(config)
        if document_masking:
            check_documents(config)


def check_pair(config: ModelConfig, tokenizer: Tokenizer | None) -> None:
    """Raise ValueError if a folder with both would not be loaded with this tokenizer."""
    if isinstance(config, CausalLMConfig) and tokenizer is not None:
        transformers_folder.check_pair(config, tokenizer)


def name_class(config: ModelConfig) -> str:
    """Return the name of the class of a model, such as GPT2 or Qwen3ForCausalLM."""
    if isinstance(config, CausalLMConfig):
        return transformers_folder.class_name(config)
    return type(config).__name__.removesuffix("Config")


def read_shape(section: dict) -> ModelConfig:
    """Return the configuration of a model from the section `model` of a run's settings."""
    if "config" in section:
        return CausalLMConfig(**section)
    kind = LlamaConfig if "mlp_width" in section else GPT2Config
    names = {each.name for each in fields(kind)} - {"rope_scaling"}
    return kind(**{name: value for name, value in section.items() if name in names})


def load_pretrained(
    folder: str | Path, *, vocabulary_multiple: int = 128, by_transformers: bool = False
) -> Model:
    """Load a model from a Hugging Face model folder, in fp32.

    Only safetensors are read, no pickle files. GPT-2, LLaMA and Qwen3 are loaded as the models of
    this library, unless `by_transformers`, their vocabulary padded with zero rows to a multiple of
    `vocabulary_multiple`; other families, and options that these models do not have, as a
    `CausalLMAdapter`.
    """
    folder = Path(folder)
    if not by_transformers and is_ours(folder):
        return hf.load_pretrained(folder, vocabulary_multiple=vocabulary_multiple)
    model = build_adapter(transformers_folder.read_config(folder))
    transformers_folder.load_weights(model, folder)
    return model


def is_ours(folder: Path) -> bool:
    """Return whether a folder holds a model that this library has itself."""
    read_hf_config(folder)  # raises ValueError for a broken config.json
    try:
        read_config(folder)
    except ValueError:
        return False
    return True


def load_weights(model: Model, folder: Path) -> None:
    """Load the safetensors of a model folder into a model, or into its local shards."""
    if isinstance(model, CausalLMAdapter):
        transformers_folder.load_weights(model, folder)
    else:
        hf.load_weights(model, folder)


def to_folder(model: Model, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return whole tensors, by the names of `saved_tensors`, as a folder holds them."""
    if isinstance(model, CausalLMAdapter):
        return transformers_folder.to_folder(model, tensors)
    return {name: hf.to_hf(name, tensor, model.config) for name, tensor in tensors.items()}


def names_in_folder(model: Model) -> dict[str, list[str]]:
    """Return the names of the tensors in a folder by that of `saved_tensors` they are made of."""
    if isinstance(model, CausalLMAdapter):
        return transformers_folder.names_in_folder(model)
    return {name: [name] for name, _ in model.named_parameters()}


def loaded_tensors(model: Model) -> dict[str, torch.Tensor]:
    """Return a model's tensors as transformers has them when it has loaded the model's folder."""
    if isinstance(model, CausalLMAdapter):
        return transformers_folder.loaded_tensors(model)
    return hf.hf_tensors(model)


def save_pretrained(
    model: Model,
    folder: Path | str,
    *,
    tokenizer: Tokenizer | None,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int | None = None,
) -> dict[str, str]:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` can load.

    Padding rows of the vocabulary are removed. Without a tokenizer, only the model is written. The
    weights are split into shards of at most `max_shard_bytes` (a larger tensor gets a shard of its
    own); by default they are one file. Weights that were in the folder are replaced once all is
    written: until then it holds the old model, and takes the room of both. Returns the xxh3_128 of
    each weight file by name. Raises ValueError as `check_saving`, `check_pair` and `unwrap` do.
    """
    model = unwrap(model)
    check_saving(dtype=dtype, tokenizer=tokenizer, max_shard_bytes=max_shard_bytes)
    check_pair(model.config, tokenizer)
    tensors = to_folder(model, saved_tensors(model))
    sizes = {n: t.numel() * stored_dtype(t, dtype).itemsize for n, t in tensors.items()}
    shards, digests, files = split_by_size(sizes, max_shard_bytes), {}, {}
    with replacing_model(Path(folder)) as new:
        for index, names in enumerate(shards):
            file = weight_file(index, len(shards))
            files |= dict.fromkeys(names, file)
            shard = {name: tensors[name] for name in names}
            digests[file] = write_weights(new / file, shard, dtype=dtype)
        if len(shards) > 1:
            write_index(new, files, total_bytes=sum(sizes.values()))
        write_configuration(model.config, new, tokenizer=tokenizer, dtype=dtype)
    return digests


def check_saving(
    *, dtype: torch.dtype, tokenizer: Tokenizer | None = None, max_shard_bytes: int | None = None
) -> None:
    """Raise ValueError for arguments of `save_pretrained` with which no folder can be written."""
    if dtype not in WEIGHT_DTYPES:
        names = ", ".join(map(str, WEIGHT_DTYPES))
        raise ValueError(f"dtype={dtype} must be one of {names}, in which weights are stored")
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise ValueError(
            f"max_shard_bytes={max_shard_bytes} must be at least 1, or None for one file"
        )
    check_tokenizer(tokenizer)


def check_tokenizer(tokenizer: Tokenizer | None) -> None:
    """Raise ValueError for a tokenizer of another library."""
    if not isinstance(tokenizer, Tokenizer | None):
        raise ValueError(
            f"tokenizer is {type(tokenizer).__module__}.{type(tokenizer).__name__}, it must be a "
            f"pretrain_lib.Tokenizer: open its folder, file or name with load_tokenizer"
        )


def write_configuration(
    config: ModelConfig,
    folder: Path,
    *,
    tokenizer: Tokenizer | None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write everything of a model folder except the weights."""
    ends = {}
    if tokenizer is not None:
        tokenizer.save(folder, context_length=config.context_length)
        ends = {f"{kind}_token_id": tokenizer.end_of_text_id for kind in ("bos", "eos")}
    if isinstance(config, CausalLMConfig):
        transformers_folder.write_configuration(config, folder, tokenizer=tokenizer, dtype=dtype)
    else:
        write_sorted_json(folder / "config.json", hf.describe_config(config, dtype) | ends)
    write_sorted_json(folder / "generation_config.json", ends)


def new_cache(model: Model, *, rows: int, slots: int) -> KeyValueCache | TransformersCache | None:
    """Return an empty cache for generation, None for a family without a working one."""
    if not isinstance(model, CausalLMAdapter):
        return KeyValueCache(model.config, rows=rows, slots=slots)
    if not runs_with_cache(model.config):
        return None
    return TransformersCache(rows=rows, slots=slots)


def checkpoint_activations(model: Model, kind: ActivationCheckpointing) -> None:
    """Set what the blocks of a model compute again in backward; it is nothing by default."""
    if isinstance(model, CausalLMAdapter):
        model.checkpoint_activations(kind)
        return
    for block in model.blocks:
        block.activation_checkpointing = kind


def attends_in_trees(config: ModelConfig) -> bool:
    """Return whether the models of a configuration take `TokenTrees`."""
    return not isinstance(config, CausalLMConfig)
