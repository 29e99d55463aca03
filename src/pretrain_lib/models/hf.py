"""To and from Hugging Face folders: names, transpositions, configuration, parity. Floor 2."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from pretrain_lib.data.tokenizer import Tokenizer
from pretrain_lib.flops import TABLES
from pretrain_lib.models.gpt2 import GPT2, GPT2Config
from pretrain_lib.models.llama import Llama, LlamaConfig
from pretrain_lib.tensor_files import write_tensors

Model = GPT2 | Llama
WEIGHTS = "model.safetensors"
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
    metadata = {"format": "pt"}  # without which transformers refuses it
    digest = write_tensors(folder / WEIGHTS, hf_tensors(model), dtype=dtype, metadata=metadata)
    ends = {}
    if tokenizer is not None:
        tokenizer.save(folder, context_length=model.config.context_length)
        ends = {f"{kind}_token_id": tokenizer.end_of_text_id for kind in ("bos", "eos")}
    config = _config_to_hf(model.config) | {"dtype": str(dtype).removeprefix("torch.")}
    _write(folder / "config.json", config | ends)
    _write(folder / "generation_config.json", ends)
    return {WEIGHTS: digest}


def hf_tensors(model: Model) -> dict[str, torch.Tensor]:
    """Return transformers' tensors of a model by transformers' names, as views where possible."""
    return {
        name: to_hf(name, parameter.detach(), model.config)
        for name, parameter in model.named_parameters()
    }


def to_hf(name: str, tensor: torch.Tensor, config: GPT2Config | LlamaConfig) -> torch.Tensor:
    """Return a parameter (or its gradient, or moments) as transformers shapes it."""
    if isinstance(config, GPT2Config) and name.endswith(TRANSPOSED):
        return tensor.t()
    return tensor[: config.vocabulary_size] if name.endswith(TABLES) else tensor


def load_pretrained(folder: str | Path, *, vocabulary_multiple: int = 128) -> Model:
    """Load a GPT-2 or LLaMA folder of transformers into our model, in fp32; nothing is unpickled.

    The vocabulary is padded with zero rows to a multiple of `vocabulary_multiple`.
    """
    folder = Path(folder)
    model = build_model(read_config(folder, vocabulary_multiple=vocabulary_multiple))
    load_weights(model, folder)
    return model


def read_config(folder: Path, *, vocabulary_multiple: int = 128) -> GPT2Config | LlamaConfig:
    """Return the configuration of a transformers folder as ours."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a model folder: it has no config.json")
    hf = json.loads(path.read_text(encoding="utf-8"))
    readers = {"gpt2": _gpt2_from_hf, "llama": _llama_from_hf}
    if hf.get("model_type") not in readers:
        raise ValueError(
            f"{path}: model_type={hf.get('model_type')!r} must be one of {', '.join(readers)}; "
            f"other families train through pretrain_lib.CausalLMAdapter"
        )
    try:
        return readers[hf["model_type"]](hf, path, vocabulary_multiple)
    except KeyError as error:
        raise ValueError(f"{path} lacks the field {error}") from error


@torch.no_grad()
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
        target = to_hf(name, parameters[name], model.config)
        if target.shape != tensor.shape:
            raise ValueError(
                f"{folder}: {name} has shape {tuple(tensor.shape)}, the model needs "
                f"{tuple(target.shape)}"
            )
        parameter = parameters.pop(name)
        parameter.zero_()
        to_hf(name, parameter, model.config).copy_(tensor)
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
    index = folder / f"{WEIGHTS}.index.json"
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


def _config_to_hf(config: GPT2Config | LlamaConfig) -> dict:
    if isinstance(config, GPT2Config):
        return {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "vocab_size": config.vocabulary_size,
            "n_positions": config.context_length,
            "n_layer": config.num_layers,
            "n_head": config.num_heads,
            "n_embd": config.width,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "embd_pdrop": config.dropout,
            "attn_pdrop": config.dropout,
            "resid_pdrop": config.dropout,
        }
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": config.vocabulary_size,
        "max_position_embeddings": config.context_length,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        # transformers 4 reads the first, 5 the second; each silently ignores the other.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tied_head,
    }


def _require(hf: dict, path: Path, expected: dict) -> None:
    for key, value in expected.items():
        if hf.get(key, value) != value:
            raise ValueError(f"{path}: {key}={hf[key]!r} is not supported, only {value!r}")


def _gpt2_from_hf(hf: dict, path: Path, multiple: int) -> GPT2Config:
    expected = {
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    }
    _require(hf, path, expected)
    if hf.get("n_inner") not in (None, 4 * hf["n_embd"]):
        raise ValueError(f"{path}: n_inner={hf['n_inner']} must be 4 x n_embd")
    dropouts = {hf.get(f"{place}_pdrop", 0.1) for place in ("embd", "attn", "resid")}
    if len(dropouts) > 1:
        raise ValueError(f"{path}: embd_pdrop, attn_pdrop and resid_pdrop must be equal")
    return GPT2Config(
        vocabulary_size=hf["vocab_size"],
        context_length=hf["n_positions"],
        num_layers=hf["n_layer"],
        num_heads=hf["n_head"],
        width=hf["n_embd"],
        dropout=dropouts.pop(),
        vocabulary_multiple=multiple,
    )


def _llama_from_hf(hf: dict, path: Path, multiple: int) -> LlamaConfig:
    expected = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    _require(hf, path, expected | {"attention_dropout": 0.0})
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"{path}: rotary scaling {rope} is not supported, only 'default'")
    if hf.get("head_dim") not in (None, hf["hidden_size"] // hf["num_attention_heads"]):
        raise ValueError(f"{path}: head_dim={hf['head_dim']} must be hidden_size / heads")
    return LlamaConfig(
        vocabulary_size=hf["vocab_size"],
        context_length=hf["max_position_embeddings"],
        num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"],
        num_key_value_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
        width=hf["hidden_size"],
        mlp_width=hf["intermediate_size"],
        rope_theta=rope.get("rope_theta", hf.get("rope_theta", 10_000.0)),
        norm_epsilon=hf["rms_norm_eps"],
        tied_head=hf.get("tie_word_embeddings", False),
        vocabulary_multiple=multiple,
    )
