"""Families of transformers in their smallest form, for the tests of `CausalLMAdapter`."""

from pretrain_lib import CausalLMConfig

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "qwen3": GROUPED | {"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True},
    "gemma3": GROUPED
    | {
        "model_type": "gemma3_text",
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mistral": GROUPED | {"model_type": "mistral", "sliding_window": 12},
    "olmo2": GROUPED | {"model_type": "olmo2"},
    "phi3": GROUPED | {"model_type": "phi3"},
    "smollm3": GROUPED | {"model_type": "smollm3", "no_rope_layers": [1, 0]},
    "gpt_neox": SMALL | {"model_type": "gpt_neox", "rotary_pct": 0.5},
    "opt": {
        "model_type": "opt",
        "vocab_size": 61,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "dropout": 0.0,
    },
    "falcon": {key: value for key, value in SMALL.items() if key != "intermediate_size"}
    | {"model_type": "falcon"},
    "granite": GROUPED
    | {
        "model_type": "granite",
        "logits_scaling": 2.0,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
    },
    "stablelm": GROUPED | {"model_type": "stablelm"},
    "mamba2": {
        "model_type": "mamba2",
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 8,
        "expand": 2,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 1,
        "chunk_size": 16,
        "max_position_embeddings": 64,
    },
    "qwen3_moe": GROUPED
    | EXPERTS
    | {"model_type": "qwen3_moe", "head_dim": 8, "moe_intermediate_size": 16},
    "olmoe": GROUPED
    | EXPERTS
    | {"model_type": "olmoe", "output_router_logits": True, "router_aux_loss_coef": 0.05},
    "gemma2": GROUPED
    | {"model_type": "gemma2", "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8},
}
ROUTED = GROUPED | {"moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 2}
ROUTED |= {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
# Those that save buffers with their weights.
WITH_BUFFERS = {
    "deepseek_v3": ROUTED
    | {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "glm4_moe": ROUTED | {"model_type": "glm4_moe", "head_dim": 8},
    "dots1": ROUTED | {"model_type": "dots1", "head_dim": 8, "n_shared_experts": 1},
    "minimax_m2": GROUPED | {"model_type": "minimax_m2", "num_local_experts": 4, "head_dim": 8},
    "apertus": GROUPED | {"model_type": "apertus"},
    "deepseek_v4": ROUTED | {"model_type": "deepseek_v4"},
}
# Those whose heads, bodies or special tokens are unlike those of other families.
UNCOMMON = {
    # divides its hidden states before the head
    "minicpm3": SMALL
    | {"model_type": "minicpm3", "dim_model_base": 8, "v_head_dim": 8}
    | {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
    "inkling": GROUPED
    | {"model_type": "inkling_text", "head_dim": 8, "moe_intermediate_size": 16}
    | {"n_routed_experts": 4, "num_experts_per_tok": 2, "logits_mup_width_multiplier": 3.0}
    # has wider heads in layers with a window
    | {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16},
    # has a subclass of nn.Linear as its head
    "dory": GROUPED | {"model_type": "dory", "head_dim": 8},
    # asks its body for a scale of the logits
    "falcon_h1": GROUPED
    | {"model_type": "falcon_h1", "lm_head_multiplier": 0.5, "mamba_d_ssm": 32}
    | {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    # names its body otherwise than its prefix
    "llama4": GROUPED
    | {"model_type": "llama4_text", "head_dim": 8, "intermediate_size_mlp": 48}
    | {"num_local_experts": 2},
    # has layers of different widths of heads
    "gemma4": GROUPED
    | {"model_type": "gemma4_text", "head_dim": 8, "global_head_dim": 16}
    | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 61},
    # has a bos_token_id that cannot be unset
    "cwm": GROUPED | {"model_type": "cwm", "head_dim": 8, "eos_token_id": 0},
    # without a layer of attention, which their caches need
    "qwen3_next": GROUPED
    | EXPERTS
    | {"model_type": "qwen3_next", "head_dim": 8, "moe_intermediate_size": 16}
    | {"shared_expert_intermediate_size": 16, "linear_num_value_heads": 4}
    | {"linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
}
# Those whose tokens attend beyond a document although its positions restart.
MIX_DOCUMENTS = ("opt", "mamba2")
# Those that do more to the logits than to multiply hidden states by a matrix.
OWN_LOGITS = ("granite", "gemma2")


def family(name, **changes):
    """Return the configuration of a family, with some fields changed."""
    return CausalLMConfig(config=(FAMILIES | UNCOMMON)[name], changes=changes)
