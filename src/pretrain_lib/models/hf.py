"""To and from Hugging Face folders: names, transpositions, configuration, parity. Floor 4."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from pretrain_lib.data.tokenizer import Tokenizer
from pretrain_lib.flops import TABLES
from pretrain_lib.models.gpt2 import GPT2, GPT2Config
from pretrain_lib.models.hf_config import config_to_hf, read_config
from pretrain_lib.models.llama import Llama, LlamaConfig
from pretrain_lib.pieces import fill
from pretrain_lib.tensor_files import write_tensors

Model = GPT2 | Llama
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
# transformers' GPT-2 keeps these four as "Conv1D": (in, out), where a Linear has (out, in).
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
PARITY_TOLERANCE = 1e-4  # of the largest logit, in fp32


def build_model(config: GPT2Config | LlamaConfig) -> Model:
    """Return the model of a configuration, its weights not yet set."""
    return GPT2(config) if isinstance(config, GPT2Config) else Llama(config)


def save_pretrained(
    model: Model,
    folder: Path,
    *,
    tokenizer: Tokenizer | None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, str]:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` load.

    The vocabulary is cut to its V rows. Without a tokenizer the folder holds the model alone.
    Returns the xxh3_128 of each file of weights by its name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digest = write_weights(folder / WEIGHTS, hf_tensors(model), dtype=dtype)
    write_configuration(model.config, folder, tokenizer=tokenizer, dtype=dtype)
    return {WEIGHTS: digest}


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
    described = config_to_hf(config) | {"dtype": str(dtype).removeprefix("torch.")}
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


def check_parity(model: Model, folder: Path) -> float:
    """Load a folder with transformers and return how far its logits are from the model's.

    The figure is the largest difference relative to the largest logit, in fp32 on the CPU. Raises
    ValueError above `PARITY_TOLERANCE`, when a weight differs, or when transformers reports a
    tensor missing or left over.
    """
    from transformers import AutoModelForCausalLM

    other, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    wrong = {key: sorted(map(str, value)) for key, value in report.items() if value}
    if wrong:
        raise ValueError(f"{folder}: transformers does not load it cleanly: {wrong}")
    theirs = other.state_dict()
    for name, tensor in hf_tensors(model).items():
        if not torch.equal(tensor.float().cpu(), theirs[name]):
            raise ValueError(f"{folder}: the weights {name} differ from the model's")
    length = min(32, model.config.context_length)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocabulary_size, (2, length), generator=generator)
    training, device = model.training, model.head_weight.device
    with torch.no_grad():
        ours = model.eval()(ids.to(device)).float().cpu()
        theirs = other.eval()(ids).logits
    model.train(training)
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    if not difference <= PARITY_TOLERANCE:
        raise ValueError(
            f"{folder}: its logits under transformers differ from the model's by {difference:.2e} "
            f"of the largest, above {PARITY_TOLERANCE}"
        )
    return difference


def _read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    index = folder / INDEX
    files = [WEIGHTS]
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    for file in files:
        path = folder / Path(file).name
        if not path.is_file():
            raise ValueError(f"{path} is missing: a model is read from safetensors only")
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                yield name, tensors.get_tensor(name)


def _write(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
