"""Convert configurations of GPT-2 and LLaMA from and to those of transformers."""

import json
from pathlib import Path

from pretrain_lib.models.gpt2 import GPT2Config
from pretrain_lib.models.llama import LlamaConfig
from pretrain_lib.models.rope import FIELDS, RopeScaling

ROPE_NAMES = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "low_frequency_factor": "low_freq_factor",
    "high_frequency_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
}


def read_config(folder: Path, *, vocabulary_multiple: int = 128) -> GPT2Config | LlamaConfig:
    """Read the configuration of a Hugging Face model folder.

    Raises ValueError for model types and options that are not supported.
    """
    path, hf = folder / "config.json", read_hf_config(folder)
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
    except TypeError as error:  # such as text instead of a number
        raise ValueError(f"{path} has a field of another type than its model's: {error}") from error


def read_hf_config(folder: Path) -> dict:
    """Return the parsed `config.json` of a Hugging Face model folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a model folder: it has no config.json")
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is broken, no JSON ({error}): copy it again") from error
    if not isinstance(hf, dict):
        raise ValueError(f"{path} must hold a JSON object, such as transformers writes")
    return hf


def config_to_hf(config: GPT2Config | LlamaConfig) -> dict:
    """Return a configuration as the contents of a `config.json`."""
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
        **_rope_to_hf(config),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tied_head,
    }


def _rope_to_hf(config: LlamaConfig) -> dict:
    """Return the RoPE fields of transformers 5 and 4, which silently ignores `rope_parameters`."""
    scaling, theta = config.rope_scaling, {"rope_theta": config.rope_theta}
    if scaling is None:
        return theta | {"rope_parameters": {"rope_type": "default"} | theta}
    names = ("factor", *FIELDS[scaling.kind])
    values = {ROPE_NAMES[name]: getattr(scaling, name) for name in names}
    values = {"rope_type": scaling.kind} | {k: v for k, v in values.items() if v is not None}
    return theta | {"rope_scaling": values, "rope_parameters": values | theta}


def _rope_from_hf(hf: dict, path: Path) -> tuple[float, RopeScaling | None]:
    # If both are present, `rope_scaling` takes precedence, as in transformers 5.
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    rope = {key: value for key, value in rope.items() if value is not None}
    theta = rope.pop("rope_theta", hf.get("rope_theta", 10_000.0))
    kind = rope.pop("rope_type", rope.get("type", "default"))
    rope.pop("type", None)
    if kind == "default" and not rope:
        return theta, None
    if kind not in FIELDS:
        raise ValueError(
            f"{path}: rotary scaling {rope} of rope_type={kind!r} is not supported, only "
            f"{', '.join(FIELDS)}"
        )
    known = {ROPE_NAMES[name]: name for name in ("factor", *FIELDS[kind])}
    needed = {"factor"} | ({"low_freq_factor", "high_freq_factor"} if kind == "llama3" else set())
    if not needed <= rope.keys() <= known.keys():
        raise ValueError(
            f"{path}: rotary scaling {rope} of rope_type={kind!r} is not supported, only with "
            f"{', '.join(sorted(needed))} and nothing but {', '.join(known)}"
        )
    if "original_context_length" in FIELDS[kind]:
        rope = {"original_max_position_embeddings": hf["max_position_embeddings"]} | rope
    return theta, RopeScaling(kind, **{known[key]: value for key, value in rope.items()})


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
    theta, scaling = _rope_from_hf(hf, path)
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
        rope_theta=theta,
        rope_scaling=scaling,
        norm_epsilon=hf["rms_norm_eps"],
        tied_head=hf.get("tie_word_embeddings", False),
        vocabulary_multiple=multiple,
    )
