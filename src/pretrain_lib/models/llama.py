"""LLaMA (Touvron et al. 2023), complete: configuration, initialization and forward.

With `qk_norm` its blocks are those of Qwen3 (Yang et al. 2025). Parameter names are those of
transformers' `LlamaForCausalLM` and `Qwen3ForCausalLM`.
Shapes: B sequences, T positions, D width, H heads, V vocabulary.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from pretrain_lib.models.attention import causal_attention
from pretrain_lib.models.blocks import CheckpointedBlock, TrainingOptions, run_blocks
from pretrain_lib.models.cache import CachedLayer, KeyValueCache, TokenTrees
from pretrain_lib.models.loss import linear_cross_entropy
from pretrain_lib.models.places import place_tokens
from pretrain_lib.models.rope import RopeScaling, read_scaling, rotary_angles, rotate
from pretrain_lib.models.token_ids import check_input_ids
from pretrain_lib.models.weight_files import TABLES
from pretrain_lib.tensors.pieces import fill
from pretrain_lib.values import check_fields, setting

INITIAL_STD = 0.02


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a LLaMA; the defaults are those of the 1.3B recipe."""

    vocabulary_size: int = setting(
        8192, "Ids of the vocabulary; by default those of your data.", unit="ids", minimum=1
    )
    context_length: int = setting(2048, "The longest sequence.", unit="tokens", minimum=1)
    num_layers: int = setting(24, "Blocks.", minimum=1)
    num_heads: int = setting(32, "Attention heads of a block.", minimum=1)
    num_key_value_heads: int = setting(
        32,
        "Heads of keys and values: fewer than num_heads for grouped-query attention (Ainslie et "
        "al. 2023).",
        minimum=1,
    )
    width: int = setting(2048, "Length of a hidden state.", minimum=1)
    mlp_width: int = setting(5632, "Length of a hidden state inside the MLP.", minimum=1)
    head_width: int | None = setting(
        None, "Length of a head's queries, keys and values; null: width / num_heads.", minimum=2
    )
    qk_norm: bool = setting(
        False,
        "RMSNorm of each head's queries and keys before the rotation, as in Qwen3 (Henry et al. "
        "2020).",
    )
    rope_theta: float = setting(10_000.0, "Base of the rotary frequencies.", above=1)
    rope_scaling: RopeScaling | None = setting(
        None, "For a context that was made longer; null: plain rotary positions."
    )
    norm_epsilon: float = setting(
        1e-5, "Added to the mean square in RMSNorm.", minimum=1e-30, maximum=1
    )
    tied_head: bool = setting(False, "Share the weights of embedding and output head.")
    vocabulary_multiple: int = setting(
        128,
        "The embedding table is padded to a multiple of this, for speed; 1: no padding.",
        unit="rows",
        minimum=1,
    )

    def __post_init__(self) -> None:
        if isinstance(self.rope_scaling, dict):
            object.__setattr__(self, "rope_scaling", read_scaling(self.rope_scaling))
        check_fields(self, name="model")
        if self.head_width is not None and self.head_width % 2:
            raise ValueError(
                f"model.head_width={self.head_width} must be even, as rotary positions need"
            )
        if self.head_width is None and self.width % (2 * self.num_heads):
            raise ValueError(
                f"model.width={self.width} must be a multiple of 2 x model.num_heads="
                f"{self.num_heads}, so that a head's width is even, as rotary positions need; or "
                f"set model.head_width"
            )
        if self.num_heads % self.num_key_value_heads:
            raise ValueError(
                f"model.num_heads={self.num_heads} must be a multiple of "
                f"model.num_key_value_heads={self.num_key_value_heads}"
            )

    @property
    def attention_width(self) -> int:
        """Length of the queries of all heads together."""
        return self.num_heads * (self.head_width or self.width // self.num_heads)

    @property
    def padded_vocabulary_size(self) -> int:
        """Number of rows of the embedding table, padding included."""
        return -(-self.vocabulary_size // self.vocabulary_multiple) * self.vocabulary_multiple

    def with_vocabulary_size(self, size: int) -> "LlamaConfig":
        """Return the same shape for another vocabulary."""
        return replace(self, vocabulary_size=size)


class Llama(nn.Module):
    """A LLaMA language model."""

    has_plain_head = True

    def __init__(self, config: LlamaConfig) -> None:
        """Build the model, with weights by torch's own seed unless it is on the meta device."""
        super().__init__()
        self.config = config
        self.options = TrainingOptions()
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.padded_vocabulary_size, config.width),
                "layers": nn.ModuleList(Block(config) for _ in range(config.num_layers)),
                "norm": nn.RMSNorm(config.width, eps=config.norm_epsilon),
            }
        )
        if not config.tied_head:
            self.lm_head = nn.Linear(config.width, config.padded_vocabulary_size, bias=False)
        if not self.head_weight.is_meta:
            self.initialize(torch.initial_seed())

    @torch.no_grad()
    def initialize(self, seed: int) -> "Llama":
        """Initialize the weights at random, identically on every machine for a seed."""
        generator = torch.Generator("cpu").manual_seed(seed)
        # Each block adds twice to the residual stream, whose variance must not grow with depth.
        residual_std = INITIAL_STD * (2 * self.config.num_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = residual_std if residual else INITIAL_STD
                vocabulary = self.config.vocabulary_size if name.endswith(TABLES) else None
                # Every process draws the whole tensor, so sharding does not change the weights.
                drawn = torch.empty(parameter.shape, device="cpu")[:vocabulary]
                fill(parameter, drawn.normal_(0.0, std, generator=generator))
            else:
                parameter.fill_(1.0)
        return self

    @property
    def head_weight(self) -> torch.Tensor:
        """The weight (V_padded, D) of the output projection, which maps hidden states to logits."""
        tied = self.config.tied_head
        return self.model["embed_tokens"].weight if tied else self.lm_head.weight

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks."""
        return self.model["layers"]

    def forward(
        self,
        input_ids: torch.Tensor,
        targets: torch.Tensor | None = None,
        document_ends: torch.Tensor | None = None,
        cache: KeyValueCache | TokenTrees | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
        """Return `(summed loss in nats, number of targets)`, or logits (B, T, V) without targets.

        `input_ids`, `targets` int64 (B, T). `document_ends` (B, E) enables document masking (see
        `interface.Model`). `cache` holds the preceding tokens, or describes the tokens as trees.
        """
        hidden = self.hidden_states(input_ids, document_ends, cache)
        vocabulary_size = self.config.vocabulary_size
        if targets is None:
            return F.linear(hidden, self.head_weight)[..., :vocabulary_size]
        return linear_cross_entropy(
            hidden,
            self.head_weight,
            targets,
            vocabulary_size=vocabulary_size,
            z_loss=self.options.z_loss if self.training else 0.0,
            compiled=self.options.compiled,
        )

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        document_ends: torch.Tensor | None = None,
        cache: KeyValueCache | TokenTrees | None = None,
    ) -> torch.Tensor:
        """Return the hidden states (B, T, D) after the final norm, before the output projection."""
        positions, boundaries, cached_layers = place_tokens(
            input_ids, document_ends, cache, context_length=self.config.context_length
        )
        config = self.config
        head_width = config.attention_width // config.num_heads
        rotation = rotary_angles(positions, head_width, config.rope_theta, config.rope_scaling)
        check_input_ids(input_ids, config.vocabulary_size)
        x = self.model["embed_tokens"](input_ids)
        x = run_blocks(
            self.blocks,
            x,
            rotation,
            boundaries,
            cached_layers=cached_layers,
        )
        return self.model["norm"](x)


class Block(CheckpointedBlock):
    """A pre-norm transformer block: attention and MLP, each with an RMSNorm and a residual."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.width, eps=config.norm_epsilon)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.width, eps=config.norm_epsilon)
        self.mlp = MLP(config)

    def compute(
        self,
        x: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        boundaries: torch.Tensor | None,
        cached: CachedLayer | TokenTrees | None,
    ) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, boundaries, cached)  # (B, T, D)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """Causal grouped-query self-attention with rotary positions, and QK-norm if asked for."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_width = config.attention_width // config.num_heads
        key_value_width = config.num_key_value_heads * self.head_width
        self.q_proj = nn.Linear(config.width, config.attention_width, bias=False)
        self.k_proj = nn.Linear(config.width, key_value_width, bias=False)
        self.v_proj = nn.Linear(config.width, key_value_width, bias=False)
        self.o_proj = nn.Linear(config.attention_width, config.width, bias=False)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_width, eps=config.norm_epsilon)
            self.k_norm = nn.RMSNorm(self.head_width, eps=config.norm_epsilon)

    def forward(
        self,
        x: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        boundaries: torch.Tensor | None,
        cached: CachedLayer | TokenTrees | None,
    ) -> torch.Tensor:
        q, k, v = (
            projection(x).unflatten(2, (-1, self.head_width))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, T, H or H_kv, head_width)
        if self.qk_norm:  # in fp32, as the other norms are under autocast
            q, k = self.q_norm(q.float()), self.k_norm(k.float())
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        q, k = rotate(q, rotation).to(v.dtype), rotate(k, rotation).to(v.dtype)
        if cached is None:
            y = causal_attention(q, k, v, boundaries=boundaries)
        else:
            y = cached.attend(q, k, v)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.mlp_width, bias=False)
        self.up_proj = nn.Linear(config.width, config.mlp_width, bias=False)
        self.down_proj = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
