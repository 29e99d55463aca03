"""GPT-2 and LLaMA in Hugging Face model folders: tensor names, layouts, configuration."""

from pathlib import Path

import torch

from pretrain_lib.models.gpt2 import GPT2, GPT2Config
from pretrain_lib.models.hf_config import config_to_hf, read_config
from pretrain_lib.models.llama import Llama, LlamaConfig
from pretrain_lib.models.weight_files import HEAD, TABLES, check_tied_head, read_tensors
from pretrain_lib.tensors.pieces import fill

OwnModel = GPT2 | Llama
# Stored by transformers' GPT-2 as "Conv1D" weights (in, out); ours are Linear weights (out, in).
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
# The prefix of all names but that of the head, which folders of a body alone omit.
BODY = {GPT2: "transformer", Llama: "model"}
# Causal masks and rotary frequencies, stored in old checkpoints.
CONSTANTS = (".attn.bias", ".attn.masked_bias", ".self_attn.rotary_emb.inv_freq")


def build_model(config: GPT2Config | LlamaConfig) -> OwnModel:
    """Build a model from its configuration."""
    return GPT2(config) if isinstance(config, GPT2Config) else Llama(config)


def describe_config(config: GPT2Config | LlamaConfig, dtype: torch.dtype) -> dict:
    """Return the contents of a `config.json`, for weights in `dtype`."""
    # transformers reads `dtype` since 4.56, and `torch_dtype` before.
    kind = dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))
    return config_to_hf(config) | kind


def hf_tensors(model: OwnModel) -> dict[str, torch.Tensor]:
    """Return a model's tensors with the names and shapes of transformers, as views if possible."""
    return {
        name: to_hf(name, parameter.detach(), model.config)
        for name, parameter in model.named_parameters()
    }


def to_hf(name: str, tensor: torch.Tensor, config: GPT2Config | LlamaConfig) -> torch.Tensor:
    """Convert a parameter, its gradient or a moment to the shape that transformers uses."""
    if _is_transposed(name, config):
        return tensor.t()
    return tensor[: config.vocabulary_size] if name.endswith(TABLES) else tensor


def _is_transposed(name: str, config: GPT2Config | LlamaConfig) -> bool:
    return isinstance(config, GPT2Config) and name.endswith(TRANSPOSED)


def load_pretrained(folder: str | Path, *, vocabulary_multiple: int = 128) -> OwnModel:
    """Load a GPT-2 or LLaMA from a Hugging Face model folder, in fp32.

    Only safetensors are read, no pickle files. The vocabulary is padded with zero rows to a
    multiple of `vocabulary_multiple`.
    """
    folder = Path(folder)
    config = read_config(folder, vocabulary_multiple=vocabulary_multiple)
    with torch.device("meta"):  # no weights are drawn that would be replaced
        model = build_model(config)
    model.to_empty(device="cpu")
    load_weights(model, folder)
    return model


def load_weights(model: OwnModel, folder: Path) -> None:
    """Load the safetensors of a model folder into a model.

    Raises ValueError for missing or unexpected tensors, for shapes that differ, and for a tied
    output projection that is stored with other values than the embedding.
    """
    parameters = dict(model.named_parameters())
    if is_tied := HEAD not in parameters:
        check_tied_head(folder)
    for name, tensor in read_tensors(folder):
        if name.endswith(CONSTANTS) or (name.endswith(HEAD) and is_tied):
            continue  # the latter is a tied output projection, stored as well
        stored = name
        if name not in parameters:  # as in the GPT-2 on the hub
            name = f"{BODY[type(model)]}.{name}"
        if name not in parameters:
            raise ValueError(f"{folder}: the tensor {stored} has no place in {model.config}")
        parameter = parameters.pop(name)
        needed = to_hf(name, torch.empty(parameter.shape, device="meta"), model.config).shape
        if needed != tensor.shape:
            shape = tuple(tensor.shape)
            raise ValueError(
                f"{folder}: {stored} has shape {shape}, the model needs {tuple(needed)}"
            )
        fill(parameter, tensor.t() if _is_transposed(name, model.config) else tensor)
    if parameters:
        raise ValueError(f"{folder}: the tensors {sorted(parameters)} are missing")
