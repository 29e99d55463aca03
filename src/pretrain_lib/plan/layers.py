"""The memory that a layer takes, operator by operator, from shapes alone.

Shapes: N tokens of a micro-batch, D width, F hidden width of the MLP, H heads, A the width of all
heads.
"""

from dataclasses import dataclass

from torch import nn

from pretrain_lib.models.gpt2 import GPT2Config
from pretrain_lib.models.llama import LlamaConfig
from pretrain_lib.models.transformers_config import CausalLMConfig
from pretrain_lib.plan.network import FP32
from pretrain_lib.plan.step import COMPUTE_BYTES, Step
from pretrain_lib.plan.transformers_memory import kept_bytes, loops, token_bytes

DOCUMENT_ROWS = 128  # that FlashAttention's backward reserves for each document


@dataclass(frozen=True)
class Layer:
    """Memory of a layer in bytes."""

    kept: int
    """Kept from forward to backward."""
    computed_again: int
    """Recomputed during the layer's backward, in addition to `kept`."""
    working: int
    """Peak of temporaries of the layer's backward, in addition to both."""


def layer_bytes(model: nn.Module, step: Step, *, copies: bool) -> Layer:
    """Return the memory of a layer; `copies` tells whether it makes bf16 copies of its weights."""
    config, N = model.config, step.tokens
    matrices = [p.numel() for p in model.blocks[0].parameters() if p.dim() >= 2]
    low = COMPUTE_BYTES[step.precision]
    if isinstance(config, CausalLMConfig):
        return _transformers_layer_bytes(model, step, copies=copies)
    is_gpt2 = isinstance(config, GPT2Config)
    whole, selected, working = (_gpt2_token if is_gpt2 else _llama_token)(config, step)
    copied = low * sum(matrices) if copies and step.precision == "bf16" else 0
    everything = N * whole + copied
    kept = {"none": everything, "selective": N * selected, "full": N * FP32 * config.width}
    # Selective checkpointing also keeps two outputs of width D that backward does not need.
    spare = 2 * low * config.width * N * (step.activation_checkpointing == "selective")
    return Layer(
        kept=kept[step.activation_checkpointing],
        computed_again=everything + spare - kept[step.activation_checkpointing]
        if step.activation_checkpointing != "none"
        else 0,
        # The gradient of a matrix has the dtype of the product and is then copied to fp32.
        working=max(N * working + FP32 * max(matrices), document_attention_bytes(config, step)),
    )


def document_attention_bytes(config: GPT2Config | LlamaConfig, step: Step) -> int:
    """Return the working space of attention's backward on CUDA when documents are kept apart.

    FlashAttention sums the gradient of q in fp32 and reserves a block of rows more per document.
    """
    if not (step.documents and step.on_cuda):
        return 0
    A = getattr(config, "attention_width", config.width)
    rows = step.tokens + DOCUMENT_ROWS * step.documents
    return FP32 * A * rows + COMPUTE_BYTES[step.precision] * 4 * A * step.tokens


def _transformers_layer_bytes(model: nn.Module, step: Step, *, copies: bool) -> Layer:
    config, N = model.config, step.tokens
    low, in_bf16 = COMPUTE_BYTES[step.precision], step.precision == "bf16"
    matrices = [p.numel() for p in model.blocks[0].parameters() if p.dim() >= 2]
    whole = kept_bytes(config, sequences=step.sequences, length=step.length, low=in_bf16)
    everything = whole // len(model.blocks) - low * sum(matrices) * (in_bf16 and not copies)
    selected, working = token_bytes(model.blocks[0], config.width, low)
    times = loops(model)  # each of which keeps its own, and is computed again by itself
    kept = {"none": everything, "selective": N * selected, "full": N * FP32 * config.width}
    kept = min(everything, round(times * kept[step.activation_checkpointing]))
    return Layer(
        kept=kept,
        computed_again=round((everything - kept) / times),
        working=N * working + FP32 * max(matrices),
    )


def _gpt2_token(config: GPT2Config, step: Step) -> tuple[int, int, int]:
    """Return bytes a token: kept whole, kept selectively, and working space of backward."""
    D, H, low = config.width, config.num_heads, COMPUTE_BYTES[step.precision]
    log_sums = 4 * H
    # Both norms (input, mean and deviation in fp32, output), q, k and v, attention output, MLP
    # hidden states before and after GELU.
    whole = 2 * (4 * D + 8) + low * (2 * D + 3 * D + D + 8 * D) + log_sums
    # Residual stream, q, k and v, attention output, both residual branches, MLP hidden states.
    selected = 4 * D + low * (3 * D + D + 2 * D + 4 * D) + log_sums
    # The MLP's second layer: fp32 gradient of its output, gradient of its input, bf16 copies.
    working = 4 * D + low * 4 * D + 4 * D * (step.precision == "bf16")
    return whole, selected, working


def _llama_token(config: LlamaConfig, step: Step) -> tuple[int, int, int]:
    """Return bytes a token: kept whole, kept selectively, and working space of backward."""
    D, F, H, low = config.width, config.mlp_width, config.num_heads, COMPUTE_BYTES[step.precision]
    A = config.attention_width
    key_value = 2 * A * config.num_key_value_heads // H
    log_sums = 4 * H
    # On a CPU, norms also keep their normalized input.
    norms = 2 * (4 * D * (1 if step.on_cuda else 2) + 4)
    if config.qk_norm:
        heads = H + config.num_key_value_heads
        norms += heads * (4 * (A // H) * (1 if step.on_cuda else 2) + 4)
    # Five linear layers take the outputs of the norms; under autocast, each makes its own copy. A
    # compiler keeps one copy for all, and computes SiLU again.
    in_bf16 = step.precision == "bf16"
    copies, hidden = (1, 3) if in_bf16 and step.fused else (5 if in_bf16 else 2, 4)
    # q, k and v, attention output, gate before and after SiLU, up, and their product.
    whole = norms + low * (copies * D + A + key_value + A + hidden * F) + log_sums
    # Residual stream, q, k and v, attention output, both residual branches, gate and up.
    selected = 4 * D + low * (A + key_value + A + 2 * D + 2 * F) + log_sums
    # The product of gate and up: gradients of both factors.
    return whole, selected, 4 * D + low * 2 * F
