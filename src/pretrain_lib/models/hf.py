"""Load and save Hugging Face model folders: tensor names, layouts, configuration."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from pretrain_lib.data.text.tokenizer import Tokenizer
from pretrain_lib.models.flops import TABLES
from pretrain_lib.models.gpt2 import GPT2, GPT2Config
from pretrain_lib.models.hf_config import config_to_hf, read_config
from pretrain_lib.models.llama import Llama, LlamaConfig
from pretrain_lib.tensors.files import write_tensors
from pretrain_lib.tensors.pieces import fill

Model = GPT2 | Llama
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
# Stored by transformers' GPT-2 as "Conv1D" weights (in, out); ours are Linear weights (out, in).
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def build_model(config: GPT2Config | LlamaConfig) -> Model:
    """Build a model from its configuration, without initializing the weights."""
    return GPT2(config) if isinstance(config, GPT2Config) else Llama(config)


def save_pretrained(
    model: Model,
    folder: Path,
    *,
    tokenizer: Tokenizer | None,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int | None = None,
) -> dict[str, str]:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` can load.

    Padding rows of the vocabulary are removed. Without a tokenizer, only the model is written. The
    weights are split into shards of at most `max_shard_bytes` (a larger tensor gets a shard of its
    own); by default they are one file. Returns the xxh3_128 of each weight file by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = hf_tensors(model)
    sizes = {name: dtype.itemsize * tensor.numel() for name, tensor in tensors.items()}
    shards, digests, files = _split(sizes, max_shard_bytes), {}, {}
    for index, names in enumerate(shards):
        file = weight_file(index, len(shards))
        files |= dict.fromkeys(names, file)
        shard = {name: tensors[name] for name in names}
        digests[file] = write_weights(folder / file, shard, dtype=dtype)
    if len(shards) > 1:
        write_index(folder, files, total_bytes=sum(sizes.values()))
    write_configuration(model.config, folder, tokenizer=tokenizer, dtype=dtype)
    return digests


def _split(sizes: dict[str, int], max_bytes: int | None) -> list[list[str]]:
    """Split tensor names into shards in order, filling each up to `max_bytes`."""
    shards, used = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and max_bytes is not None and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def weight_file(index: int, count: int) -> str:
    """Return the name of weight file `index` (from 0) of `count`."""
    if count == 1:
        return WEIGHTS
    return WEIGHTS.replace(".", f"-{index + 1:05d}-of-{count:05d}.")


def write_weights(
    path: Path, tensors: dict[str, torch.Tensor], *, dtype: torch.dtype = torch.float32
) -> str:
    """Write tensors with the names and shapes of transformers; return the file's xxh3_128."""
    # transformers rejects a file whose metadata does not name the framework.
    return write_tensors(path, tensors, dtype=dtype, metadata={"format": "pt"})


def write_index(folder: Path, files: dict[str, str], *, total_bytes: int) -> None:
    """Write the index of sharded weights: the file that contains each tensor."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": files}
    _write(folder / INDEX, index)


def write_configuration(
    config: GPT2Config | LlamaConfig,
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
    # transformers reads `dtype` since 4.56, and `torch_dtype` before.
    kind = dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))
    described = config_to_hf(config) | kind
    _write(folder / "config.json", described | ends)
    _write(folder / "generation_config.json", ends)


def hf_tensors(model: Model) -> dict[str, torch.Tensor]:
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


def load_pretrained(folder: str | Path, *, vocabulary_multiple: int = 128) -> Model:
    """Load a GPT-2 or LLaMA from a Hugging Face model folder, in fp32.

    Only safetensors are read, no pickle files. The vocabulary is padded with zero rows to a
    multiple of `vocabulary_multiple`.
    """
    folder = Path(folder)
    model = build_model(read_config(folder, vocabulary_multiple=vocabulary_multiple))
    load_weights(model, folder)
    return model


def load_weights(model: Model, folder: Path) -> None:
    """Load the safetensors of a model folder into a model.

    Raises ValueError for missing or unexpected tensors, and for shapes that differ.
    """
    parameters = dict(model.named_parameters())
    for name, tensor in _read_tensors(folder):
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # causal masks, stored in old GPT-2 checkpoints
        if name not in parameters and isinstance(model, GPT2):
            name = f"transformer.{name}"  # GPT-2 on the hub omits the prefix
        if name.endswith("lm_head.weight") and name not in parameters:
            continue  # a tied output projection, stored as well
        if name not in parameters:
            raise ValueError(f"{folder}: the tensor {name} has no place in {model.config}")
        parameter = parameters.pop(name)
        needed = to_hf(name, torch.empty(parameter.shape, device="meta"), model.config).shape
        if needed != tensor.shape:
            raise ValueError(
                f"{folder}: {name} has shape {tuple(tensor.shape)}, the model needs {tuple(needed)}"
            )
        fill(parameter, tensor.t() if _is_transposed(name, model.config) else tensor)
    if parameters:
        raise ValueError(f"{folder}: the tensors {sorted(parameters)} are missing")


def check_weights(folder: Path) -> None:
    """Raise ValueError if a weight file of a folder is missing, damaged or truncated."""
    for path in _weight_files(folder):
        with _open_tensors(path):
            pass


def _read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in _weight_files(folder):
        with _open_tensors(path) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                yield name, tensors.get_tensor(name)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.is_file():
        return [folder / WEIGHTS]
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is broken, no index of weights: copy it again") from error
    return [folder / Path(file).name for file in sorted(set(files))]


def _open_tensors(path: Path) -> safe_open:
    if not path.is_file():
        raise ValueError(f"{path} is missing: a model is read from safetensors only")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is broken or cut short ({error}): copy it again") from error


def _write(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
