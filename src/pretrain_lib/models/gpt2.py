"""GPT-2 (Radford et al. 2019), complete: configuration, initialization and forward.

Parameter names are those of transformers' `GPT2LMHeadModel`.
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
from pretrain_lib.models.token_ids import check_input_ids
from pretrain_lib.tensors.pieces import fill
from pretrain_lib.values import check_fields, setting

INITIAL_STD = 0.02


@dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2; the defaults are those of the 124M model."""

    vocabulary_size: int = setting(
        50257, "Ids of the vocabulary; by default those of your data.", unit="ids", minimum=1
    )
    context_length: int = setting(
        1024,
        "Positions that have an embedding: the longest sequence.",
        unit="tokens",
        minimum=1,
    )
    num_layers: int = setting(12, "Blocks.", minimum=1)
    num_heads: int = setting(12, "Attention heads of a block.", minimum=1)
    width: int = setting(768, "Length of a hidden state.", minimum=1)
    dropout: float = setting(
        0.0,
        "Probability with which dropout zeroes embeddings, attention weights and what blocks add.",
        minimum=0,
        below=1,
    )
    vocabulary_multiple: int = setting(
        128,
        "The embedding table is padded to a multiple of this, for speed; 1: no padding.",
        unit="rows",
        minimum=1,
    )

    def __post_init__(self) -> None:
        check_fields(self, name="model")
        if self.width % self.num_heads:
            raise ValueError(
                f"model.width={self.width} must be a multiple of model.num_heads={self.num_heads}"
            )

    @property
    def padded_vocabulary_size(self) -> int:
        """Number of rows of the embedding table, padding included."""
        return -(-self.vocabulary_size // self.vocabulary_multiple) * self.vocabulary_multiple

    def with_vocabulary_size(self, size: int) -> "GPT2Config":
        """Return the same shape for another vocabulary."""
        return replace(self, vocabulary_size=size)


class GPT2(nn.Module):
    """A GPT-2 language model, whose output projection is tied to the embedding."""

    has_plain_head = True

    def __init__(self, config: GPT2Config) -> None:
        """Build the model, with weights by torch's own seed unless it is on the meta device."""
        super().__init__()
        self.config = config
        self.options = TrainingOptions()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.padded_vocabulary_size, config.width),
                "wpe": nn.Embedding(config.context_length, config.width),
                "h": nn.ModuleList(Block(config) for _ in range(config.num_layers)),
                "ln_f": nn.LayerNorm(config.width),
            }
        )
        if not self.head_weight.is_meta:
            self.initialize(torch.initial_seed())

    @torch.no_grad()
    def initialize(self, seed: int) -> "GPT2":
        """Initialize the weights as in the GPT-2 paper, identically on every machine for a seed."""
        generator = torch.Generator("cpu").manual_seed(seed)
        # Each block adds twice to the residual stream, whose variance must not grow with depth.
        residual_std = INITIAL_STD * (2 * self.config.num_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                std = residual_std if name.endswith("c_proj.weight") else INITIAL_STD
                vocabulary = self.config.vocabulary_size if "wte" in name else None
                # Every process draws the whole tensor, so sharding does not change the weights.
                drawn = torch.empty(parameter.shape, device="cpu")[:vocabulary]
                fill(parameter, drawn.normal_(0.0, std, generator=generator))
            else:
                parameter.fill_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0)
        return self

    @property
    def head_weight(self) -> torch.Tensor:
        """The weight (V_padded, D) of the output projection, which maps hidden states to logits."""
        return self.transformer["wte"].weight

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks."""
        return self.transformer["h"]

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
        hidden = self.hidden_states(input_ids, document_ends, cache, sparse_gradient=True)
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
        *,
        sparse_gradient: bool = False,
    ) -> torch.Tensor:
        """Return the hidden states (B, T, D) after the final norm, before the output projection.

        `sparse_gradient`: on a CPU the embedding's gradient is sparse, which saves the memory of a
        second table where it is added to that of the tied output projection. Alone it would stay
        sparse, which optimizers refuse.
        """
        positions, boundaries, cached_layers = place_tokens(
            input_ids, document_ends, cache, context_length=self.config.context_length
        )
        check_input_ids(input_ids, self.config.vocabulary_size)
        sparse = sparse_gradient and input_ids.device.type == "cpu"
        x = F.embedding(input_ids, self.head_weight, sparse=sparse)
        x = x + self.transformer["wpe"](positions)
        x = F.dropout(x, self.config.dropout, self.training)
        x = run_blocks(self.blocks, x, boundaries, cached_layers=cached_layers)
        return self.transformer["ln_f"](x)


class Block(CheckpointedBlock):
    """A pre-norm transformer block: attention and MLP, each with a LayerNorm and a residual."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config)

    def compute(
        self,
        x: torch.Tensor,
        boundaries: torch.Tensor | None,
        cached: CachedLayer | TokenTrees | None,
    ) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), boundaries, cached)  # (B, T, D)
        return x + self.mlp(self.ln_2(x))


class Attention(nn.Module):
    """Causal self-attention with a joint projection for queries, keys and values."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.width, 3 * config.width)
        self.c_proj = nn.Linear(config.width, config.width)

    def forward(
        self,
        x: torch.Tensor,
        boundaries: torch.Tensor | None,
        cached: CachedLayer | TokenTrees | None,
    ) -> torch.Tensor:
        B, T, D = x.shape
        q, k, v = (
            part.view(B, T, self.num_heads, D // self.num_heads).transpose(1, 2)
            for part in self.c_attn(x).split(D, dim=2)
        )  # (B, H, T, D / H) each
        dropout = self.dropout if self.training else 0.0
        if cached is None:
            y = causal_attention(q, k, v, boundaries=boundaries, dropout=dropout)
        else:
            y = cached.attend(q, k, v)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, D))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers with a GELU (tanh approximation) in between; the hidden width is 4 D."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.width, 4 * config.width)
        self.c_proj = nn.Linear(4 * config.width, config.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return F.dropout(x, self.dropout, self.training)
