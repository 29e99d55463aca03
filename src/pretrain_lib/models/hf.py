"""To and from Hugging Face folders: names, transpositions, configuration."""

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
# transformers' GPT-2 keeps these four as "Conv1D": (in, out), where a Linear has (out, in).
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def build_model(config: GPT2Config | LlamaConfig) -> Model:
    """Return the model of a configuration, its weights not yet set."""
    return GPT2(config) if isinstance(config, GPT2Config) else Llama(config)


def save_pretrained(
    model: Model,
    folder: Path,
    *,
    tokenizer: Tokenizer | None,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int | None = None,
) -> dict[str, str]:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` load.

    The vocabulary is cut to its V rows. Without a tokenizer the folder holds the model alone.
    Files of weights hold at most `max_shard_bytes`, or a single larger tensor; default: one file.
    Returns the xxh3_128 of each file of weights by its name.
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
    """Return names in their order, so many to a file as fit."""
    shards, used = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and max_bytes is not None and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def weight_file(index: int, count: int) -> str:
    """Return the name of one of so many files of weights."""
    if count == 1:
        return WEIGHTS
    return WEIGHTS.replace(".", f"-{index + 1:05d}-of-{count:05d}.")


def write_weights(
    path: Path, tensors: dict[str, torch.Tensor], *, dtype: torch.dtype = torch.float32
) -> str:
    """Write tensors that are named and shaped as transformers does; return their xxh3_128."""
    # transformers refuses a file that does not say of which framework it is.
    return write_tensors(path, tensors, dtype=dtype, metadata={"format": "pt"})


def write_index(folder: Path, files: dict[str, str], *, total_bytes: int) -> None:
    """Say in which file of a folder each tensor lies, where they lie in several."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": files}
    _write(folder / INDEX, index)


def write_configuration(
    config: GPT2Config | LlamaConfig,
    folder: Path,
    *,
    tokenizer: Tokenizer | None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write all of a model folder but the weights."""
    ends = {}
    if tokenizer is not None:
        tokenizer.save(folder, context_length=config.context_length)
        ends = {f"{kind}_token_id": tokenizer.end_of_text_id for kind in ("bos", "eos")}
    # The first is read since transformers 4.56, the second before.
    kind = dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))
    described = config_to_hf(config) | kind
    _write(folder / "config.json", described | ends)
    _write(folder / "generation_config.json", ends)


def hf_tensors(model: Model) -> dict[str, torch.Tensor]:
    """Return transformers' tensors of a model by transformers' names, as views where possible."""
    return {
        name: to_hf(name, parameter.detach(), model.config)
        for name, parameter in model.named_parameters()
    }


def to_hf(name: str, tensor: torch.Tensor, config: GPT2Config | LlamaConfig) -> torch.Tensor:
    """Return a parameter (or its gradient, or moments) as transformers shapes it."""
    if _is_transposed(name, config):
        return tensor.t()
    return tensor[: config.vocabulary_size] if name.endswith(TABLES) else tensor


def _is_transposed(name: str, config: GPT2Config | LlamaConfig) -> bool:
    return isinstance(config, GPT2Config) and name.endswith(TRANSPOSED)


def load_pretrained(folder: str | Path, *, vocabulary_multiple: int = 128) -> Model:
    """Load a GPT-2 or LLaMA folder of transformers into our model, in fp32; nothing is unpickled.

    The vocabulary is padded with zero rows to a multiple of `vocabulary_multiple`.
    """
    folder = Path(folder)
    model = build_model(read_config(folder, vocabulary_multiple=vocabulary_multiple))
    load_weights(model, folder)
    return model


def load_weights(model: Model, folder: Path) -> None:
    """Fill a model from the safetensors of a transformers folder; each tensor must fit."""
    parameters = dict(model.named_parameters())
    for name, tensor in _read_tensors(folder):
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # causal masks that old GPT-2 checkpoints carry
        if name not in parameters and isinstance(model, GPT2):
            name = f"transformer.{name}"  # the hub's own GPT-2 folders leave the prefix out
        if name.endswith("lm_head.weight") and name not in parameters:
            continue  # a tied head, stored twice
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
    """Raise ValueError unless a folder's files of weights are there and as long as they say."""
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
