"""Convert configurations of GPT-2, LLaMA and Qwen3 from and to those of transformers."""

from pathlib import Path

from pretrain_lib.files.reading import read_object
from pretrain_lib.models.gpt2 import GPT2Config
from pretrain_lib.models.llama import LlamaConfig
from pretrain_lib.models.rope import FIELDS, RopeScaling
from pretrain_lib.wording import in_line

ROPE_NAMES = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "low_frequency_factor": "low_freq_factor",
    "high_frequency_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
}
# Names of activation functions that are the same as those used here.
SAME_FUNCTION = {"gelu_pytorch_tanh": "gelu_new", "swish": "silu"}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "mlp_bias": False}
QWEN3 = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "use_sliding_window": False,
    "sliding_window": None,
}
QWEN3_HEAD_WIDTH = 128  # where a config.json does not say it
# What transformers also calls the fields of a GPT-2; given both, it takes these.
GPT2_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def read_config(folder: Path, *, vocabulary_multiple: int = 128) -> GPT2Config | LlamaConfig:
    """Read the configuration of a Hugging Face model folder.

    Raises ValueError for model types and options that are not supported.
    """
    path, hf = folder / "config.json", read_hf_config(folder)
    readers = {"gpt2": _gpt2_from_hf, "llama": _llama_from_hf, "qwen3": _qwen3_from_hf}
    if hf.get("model_type") not in list(readers):  # it may be of any type
        raise ValueError(
            f"{path}: model_type={hf.get('model_type')!r} must be one of {', '.join(readers)}; "
            f"other families train with the recipe causal_lm"
        )
    for key in ("quantization_config", "per_layer_config"):
        if key in hf:
            raise ValueError(f"{path}: {key} is not supported")
    _require(hf, path, {"is_causal": True})
    try:
        return readers[hf["model_type"]](hf, path, vocabulary_multiple)
    except KeyError as error:
        raise ValueError(f"{path} lacks the field {in_line(error)}") from error
    except TypeError as error:  # such as text instead of a number
        raise ValueError(
            f"{path} has a field of another type than its model's: {in_line(error)}"
        ) from error


def read_hf_config(folder: Path) -> dict:
    """Return the parsed `config.json` of a Hugging Face model folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a model folder: it has no config.json")
    return parse_hf_config(path)


def parse_hf_config(path: Path) -> dict:
    """Return the content of a `config.json`; raises ValueError if it is not a JSON object."""
    return read_object(path, remedy="copy it again")


def config_to_hf(config: GPT2Config | LlamaConfig) -> dict:
    """Return a configuration as the contents of a `config.json`."""
    if isinstance(config, GPT2Config):
        return {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "vocab_size": config.vocabulary_size,
            "n_positions": config.context_length,
            "n_ctx": config.context_length,  # read by the converter of llama.cpp
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
        **(QWEN3 if config.qk_norm else LLAMA),
        "vocab_size": config.vocabulary_size,
        "max_position_embeddings": config.context_length,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.attention_width // config.num_heads,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        **_rope_to_hf(config),
        "attention_bias": False,
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
    name = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    rope = hf.get(name) or {}
    if not isinstance(rope, dict):
        raise TypeError(f"{name}={rope!r} must be an object, such as {{'rope_type': 'default'}}")
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
    names = {ROPE_NAMES[name]: name for name in ("factor", *FIELDS[kind])}
    needed = {"factor"} | ({"low_freq_factor", "high_freq_factor"} if kind == "llama3" else set())
    if not needed <= rope.keys() <= names.keys():
        raise ValueError(
            f"{path}: rotary scaling {rope} of rope_type={kind!r} is not supported, only with "
            f"{', '.join(sorted(needed))} and nothing but {', '.join(names)}"
        )
    if "original_context_length" in FIELDS[kind]:
        if "original_max_position_embeddings" in hf:  # which goes before that of the scaling
            raise ValueError(f"{path}: original_max_position_embeddings is supported in it only")
        rope = {"original_max_position_embeddings": hf["max_position_embeddings"]} | rope
    return theta, RopeScaling(kind, **{names[key]: value for key, value in rope.items()})


def _require(hf: dict, path: Path, expected: dict) -> None:
    for key, value in expected.items():
        given = hf.get(key, value)
        if given != value and SAME_FUNCTION.get(given if isinstance(given, str) else "") != value:
            raise ValueError(f"{path}: {key}={hf[key]!r} is not supported, only {value!r}")


def _gpt2_from_hf(hf: dict, path: Path, multiple: int) -> GPT2Config:
    expected = {
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    }
    _require(hf, path, expected | {alias: hf[name] for alias, name in GPT2_ALIASES.items()})
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
    _require(hf, path, {"mlp_bias": False})
    return _blocks_from_hf(hf, path, multiple, head_width=hf.get("head_dim"), qk_norm=False)


def _qwen3_from_hf(hf: dict, path: Path, multiple: int) -> LlamaConfig:
    _require(hf, path, {"use_sliding_window": False})
    kinds = set(hf.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        raise ValueError(f"{path}: layer_types={sorted(kinds)} are not supported")
    width = hf.get("head_dim", QWEN3_HEAD_WIDTH)
    return _blocks_from_hf(hf, path, multiple, head_width=width, qk_norm=True)


def _blocks_from_hf(
    hf: dict, path: Path, multiple: int, *, head_width: int | None, qk_norm: bool
) -> LlamaConfig:
    expected = {"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0}
    _require(hf, path, expected)
    theta, scaling = _rope_from_hf(hf, path)
    is_usual = head_width and head_width * hf["num_attention_heads"] == hf["hidden_size"]
    return LlamaConfig(
        vocabulary_size=hf["vocab_size"],
        context_length=hf["max_position_embeddings"],
        num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"],
        num_key_value_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
        width=hf["hidden_size"],
        head_width=None if is_usual else head_width,
        qk_norm=qk_norm,
        mlp_width=hf["intermediate_size"],
        rope_theta=theta,
        rope_scaling=scaling,
        norm_epsilon=hf["rms_norm_eps"],
        tied_head=hf.get("tie_word_embeddings", False),
        vocabulary_multiple=multiple,
    )
