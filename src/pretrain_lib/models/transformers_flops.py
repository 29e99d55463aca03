"""Parameters and lengths that determine the FLOPs of a model of transformers, from its modules."""

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from pretrain_lib.models.adapter import CausalLMAdapter

# How the families call the number of their experts, and of those that each token uses.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k")


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


def attended_width(hf: "PreTrainedConfig", sequence_length: int) -> int:
    """Return the sum over all layers of attention width times the tokens that a token may see.

    Layers of other kinds, such as state spaces, attend to none; a sliding window limits the tokens.
    """
    heads = getattr(hf, "num_attention_heads", None)
    if heads is None:
        return 0
    width = heads * (getattr(hf, "head_dim", None) or hf.hidden_size // heads)
    kinds = getattr(hf, "layer_types", None) or ["full_attention"] * hf.num_hidden_layers
    window = getattr(hf, "sliding_window", None) or sequence_length
    lengths = {
        "full_attention": sequence_length,
        "sliding_attention": min(window, sequence_length),
    }
    return width * sum(lengths.get(kind, 0) for kind in kinds)


def count_experts(hf: "PreTrainedConfig") -> tuple[int, float] | None:
    """Return the number of experts and the share that a token uses; None if there are none."""
    found = [
        next((number for name in names if (number := getattr(hf, name, None))), None)
        for names in (EXPERTS, CHOSEN_EXPERTS)
    ]
    number, chosen = found
    return (number, chosen / number) if number and chosen else None
