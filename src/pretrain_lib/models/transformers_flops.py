"""Parameters and lengths that determine the FLOPs of a model of transformers, from its modules."""

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from pretrain_lib.models.adapter import CausalLMAdapter

# How the families call the number of their experts, and of those that each token uses.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k")

# Kinds of layers that have no attention, and what limits the attention of others.
WITHOUT_ATTENTION = ("linear_attention", "mamba", "conv", "moe", "mlp")
LIMITS = {
    "sliding_attention": "sliding_window",
    "hybrid_sliding": "sliding_window",
    "chunked_attention": "attention_chunk_size",
    "local": "window_size",  # of GPT-Neo, which has its kinds in `attention_layers`
}


def count_active_weights(model: "CausalLMAdapter") -> float:
    """Return the number of parameters used for each token, without those of untied embeddings.

    Of a mixture of experts, only the experts that a token uses count.
    """
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    looked_up = {id(table) for table in tables if table is not model.head_weight}
    experts, share = count_experts(model.config.hf) or (0, 1.0)
    return sum(
        parameter.numel() * (share if parameter.dim() == 3 and len(parameter) == experts else 1)
        for parameter in model.parameters()
        if id(parameter) not in looked_up
    )


def attended_width(hf: "PreTrainedConfig", sequence_length: int) -> float:
    """Return the sum over all layers of attention width times the tokens that a token may see.

    Those of linear attention, state spaces and convolutions attend to none; a sliding window, and a
    chunk, limit the tokens. All other kinds, such as sparse attention, count as full attention.
    """
    if getattr(hf, "is_heterogeneous", False):
        layers = list(hf.per_layer_config)
    else:
        layers = [hf] * hf.num_hidden_layers
    # Any configuration may hold a field that its family does not know.
    has_window = hasattr(type(hf), "sliding_window")
    alike = ["sliding_attention" if has_window else "full_attention"] * len(layers)
    kinds = getattr(hf, "layer_types", None) or getattr(hf, "attention_layers", None) or alike
    return sum(
        _attention_width(layer) * _visible_tokens(layer, kind, sequence_length)
        for layer, kind in zip(layers, kinds, strict=True)
    )


def _attention_width(layer: "PreTrainedConfig") -> float:
    """Return the width of all heads, the mean of that of the keys and that of the values."""
    heads = getattr(layer, "num_attention_heads", None)
    if not heads:
        return 0
    width = getattr(layer, "head_dim", None) or layer.hidden_size // heads
    if hasattr(layer, "qk_nope_head_dim"):  # latent attention, whose `head_dim` is of a part
        width = layer.qk_nope_head_dim + layer.qk_rope_head_dim
    return heads * (width + (getattr(layer, "v_head_dim", None) or width)) / 2


def _visible_tokens(layer: "PreTrainedConfig", kind: str, sequence_length: int) -> int:
    if kind in WITHOUT_ATTENTION:
        return 0
    limit = LIMITS.get(kind)
    return min((limit and getattr(layer, limit, None)) or sequence_length, sequence_length)


def count_experts(hf: "PreTrainedConfig") -> tuple[int, float] | None:
    """Return the number of experts and the share that a token uses; None if there are none."""
    found = [
        next((number for name in names if (number := getattr(hf, name, None))), None)
        for names in (EXPERTS, CHOSEN_EXPERTS)
    ]
    number, chosen = found
    return (number, chosen / number) if number and chosen else None
