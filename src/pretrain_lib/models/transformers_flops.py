"""Parameters and lengths that determine the FLOPs of a model of transformers, from its modules."""

from collections import Counter
from typing import TYPE_CHECKING, Any

from torch import nn

from pretrain_lib.models.transformers_fake import count_calls
from pretrain_lib.models.transformers_family import count_experts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from pretrain_lib.models.adapter import CausalLMAdapter

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

    Of a mixture of experts, only the experts that a token uses count. Weights that are used in
    several passes, as in a loop over layers, count in each.
    """
    experts, share = count_experts(model.config.hf) or (0, 1.0)
    calls = count_calls(model.config)
    passes = Counter()  # of each parameter, in all modules that have it
    for name, module in model.model.named_modules():
        if not isinstance(module, nn.Embedding):
            for parameter in module.parameters(recurse=False):
                passes[parameter] += calls.passes(name)
    return sum(
        parameter.numel()
        * (share if parameter.dim() == 3 and len(parameter) == experts else 1)
        # The weights of modules that are never called are used elsewhere, as those of the head.
        * (times or 1)
        for parameter, times in passes.items()
    )


def attended_width(model: "CausalLMAdapter", sequence_length: int) -> float:
    """Return the sum over all layers of attention width times the tokens that a token may see.

    Those of linear attention, state spaces and convolutions attend to none; a sliding window, and a
    chunk, limit the tokens. All other kinds, such as sparse attention, count as full attention.
    """
    hf = model.config.hf
    if getattr(hf, "is_heterogeneous", False):
        layers = list(hf.per_layer_config)
    else:
        layers = [hf] * hf.num_hidden_layers
    # Any configuration may hold a field that its family does not know.
    has_window = hasattr(type(hf), "sliding_window")
    alike = ["sliding_attention" if has_window else "full_attention"] * len(layers)
    kinds = getattr(hf, "layer_types", None) or getattr(hf, "attention_layers", None) or alike
    return sum(
        _attention_width(layer, kind) * _visible_tokens(layer, kind, sequence_length) * passes
        for layer, kind, passes in zip(layers, kinds, _passes(model, len(layers)), strict=True)
    )


def _passes(model: "CausalLMAdapter", layers: int) -> list[float]:
    """Return in how many passes each layer is; 1 if a configuration lists those of a loop."""
    names = {module: name for name, module in model.model.named_modules()}
    calls, blocks = count_calls(model.config), model.blocks
    if len(blocks) != layers:
        return [1] * layers
    return [calls.passes(names[block]) or 1 for block in blocks]


def _attention_width(layer: "PreTrainedConfig", kind: str) -> float:
    """Return the width of all heads, the mean of that of the keys and that of the values."""

    def shape(name: str) -> Any:
        """Return a field, which layers with a window may have for themselves."""
        sliding = getattr(layer, f"swa_{name}", None) if kind == "hybrid_sliding" else None
        return sliding or getattr(layer, name, None)

    heads = shape("num_attention_heads")
    if not heads:
        return 0
    width = shape("head_dim") or layer.hidden_size // heads
    if hasattr(layer, "qk_nope_head_dim"):  # latent attention, whose `head_dim` is of a part
        width = layer.qk_nope_head_dim + layer.qk_rope_head_dim
    return heads * (width + (getattr(layer, "v_head_dim", None) or width)) / 2


def _visible_tokens(layer: "PreTrainedConfig", kind: str, sequence_length: int) -> int:
    if kind in WITHOUT_ATTENTION:
        return 0
    limit = LIMITS.get(kind)
    return min((limit and getattr(layer, limit, None)) or sequence_length, sequence_length)
