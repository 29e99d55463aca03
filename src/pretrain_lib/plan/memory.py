"""Estimate the peak memory of a training step from shapes alone.

The estimate adds up the tensors that GPT-2 and LLaMA keep for backward, operator by operator,
without dropout; for other families see `transformers_memory`. Of compilation, what counts most is
taken into account.

Shapes: N tokens of a micro-batch, D width, F hidden width of the MLP, H heads, V rows of the output
projection.
"""

from dataclasses import dataclass

from torch import nn

from pretrain_lib.models.gpt2 import GPT2Config
from pretrain_lib.models.llama import LlamaConfig
from pretrain_lib.models.loss import chunk_rows
from pretrain_lib.models.transformers_config import CausalLMConfig
from pretrain_lib.plan.muon import muon_cost
from pretrain_lib.plan.network import FP32, Sizes, World
from pretrain_lib.plan.transformers_memory import kept_bytes, token_bytes

COMPUTE_BYTES = {"bf16": 2, "fp32": 4}
DOCUMENT_ROWS = 128  # that FlashAttention's backward reserves for each document
GATHERED_LAYERS = 2  # of a sharded model, at a time: the current one and the prefetched next one


@dataclass(frozen=True)
class Step:
    """The properties of a training step, on one device, that determine its memory."""

    sequences: int
    """Sequences per micro-batch."""
    length: int
    """Tokens per sequence."""
    micro_batches: int = 1
    precision: str = "bf16"
    """Precision of the matrix products: bf16 (autocast) or fp32."""
    activation_checkpointing: str = "none"
    moments: str = "fp32"
    muon: bool = False
    on_cuda: bool = True
    """On a CPU, the norms of LLaMA keep more, and the loss is computed in smaller blocks."""
    compiled: bool = True
    """On CUDA, compiled blocks of LLaMA keep less, and the compiled loss stores no fp32 logits."""
    documents: int = 0
    """Documents per micro-batch that are kept apart; 0 without document masking."""

    @property
    def fused(self) -> bool:
        """Whether the blocks are compiled for CUDA."""
        return self.on_cuda and self.compiled

    @property
    def tokens(self) -> int:
        """Tokens per micro-batch (N)."""
        return self.sequences * self.length


@dataclass(frozen=True)
class Memory:
    """Memory of one device in bytes.

    Backward allocates gradients while it frees activations, so the peak is less than the sum.
    """

    weights: int
    gradients: int
    """Gradients kept until the update; unsharded during gradient accumulation."""
    moments: int
    buffers: int
    """DDP's buckets, or the gathered weights of a sharded model."""
    activations: int
    """Kept from forward to backward, including bf16 copies of the weights."""
    loss: int
    """Peak of the output projection and loss, in addition to the activations."""
    peak: int


@dataclass(frozen=True)
class _Layer:
    """Memory of a layer in bytes."""

    kept: int
    """Kept from forward to backward."""
    computed_again: int
    """Recomputed during the layer's backward, in addition to `kept`."""
    working: int
    """Peak of temporaries of the layer's backward, in addition to both."""


@dataclass(frozen=True)
class _Gradients:
    """Memory of the gradients in bytes, sharded or not, at four points of a step."""

    before: int
    """When forward begins: the accumulated gradients of previous micro-batches."""
    at_last_layer: int
    at_first_layer: int
    after: int
    """When backward ends."""


def model_sizes(model: nn.Module) -> Sizes:
    """Return the parameter counts of a model, which may be on the meta device."""
    total = sum(parameter.numel() for parameter in model.parameters())
    blocks = sum(parameter.numel() for block in model.blocks for parameter in block.parameters())
    return Sizes(total=total, block=blocks // len(model.blocks), num_layers=len(model.blocks))


def estimate_memory(model: nn.Module, step: Step, world: World | None = None) -> Memory:
    """Estimate the memory per device of a training step, from the second step on."""
    world, sizes = world or World(), model_sizes(model)
    weights = FP32 * sizes.total // world.group
    moments = moment_bytes(model, step) // world.group
    buffers = _buffer_bytes(sizes, world)
    layer = _layer_bytes(model, step, copies=world.gather_bytes == FP32)
    activations = _activation_bytes(model, step, layer)
    gradients = _gradient_bytes(model, step, world)
    loss = _loss_bytes(model, step)
    again = layer.computed_again + layer.working
    peaks = [
        gradients.before + activations + loss,
        gradients.before + activations + _head_backward_bytes(model, step),
        gradients.at_last_layer + activations + again,
        gradients.at_first_layer + layer.kept + again,
        gradients.after,
        FP32 * sizes.total // world.group + _update_bytes(model, step, world),
    ]
    if world.is_sharded:  # evaluation gathers the whole model, without gradients
        peaks.append(FP32 * sizes.total - buffers)
    peak = weights + moments + buffers + max(peaks)
    kept = max(weights, gradients.before)
    return Memory(weights, kept, moments, buffers, activations, loss, peak)


def moment_bytes(model: nn.Module, step: Step) -> int:
    """Return the bytes of all moments: AdamW's two per parameter, one where Muon updates it."""
    by_muon = muon_cost(model, World(), itemsize=FP32).elements if step.muon else 0
    return COMPUTE_BYTES[step.moments] * (2 * model_sizes(model).total - by_muon)


def _update_bytes(model: nn.Module, step: Step, world: World) -> int:
    """Return the memory at the height of the update; AdamW's kernels need none."""
    itemsize = COMPUTE_BYTES[step.precision]
    return muon_cost(model, world, itemsize=itemsize).working_bytes if step.muon else 0


def _buffer_bytes(sizes: Sizes, world: World) -> int:
    if world.is_sharded:
        layers = min(GATHERED_LAYERS, sizes.num_layers)
        return world.gather_bytes * (sizes.root + layers * sizes.block)
    return FP32 * sizes.total if world.devices > 1 else 0


def _gradient_bytes(model: nn.Module, step: Step, world: World) -> _Gradients:
    sizes, table = model_sizes(model), FP32 * model.head_weight.numel()
    tied = _is_tied(model)
    if step.micro_batches > 1:
        # Even sharded models accumulate unsharded gradients until the last micro-batch. The new
        # gradient of a tied output projection waits for the embedding's before it is added.
        whole = FP32 * sizes.total
        waiting = table * tied
        return _Gradients(whole, whole + waiting, whole + waiting, whole + table * (1 + tied))
    if world.is_sharded:
        own = FP32 * sizes.total // world.group
        in_flight = FP32 * min(GATHERED_LAYERS, sizes.num_layers) * sizes.block
        root = FP32 * sizes.root
        return _Gradients(0, table + in_flight, own + root + in_flight, own + root)
    whole = FP32 * sizes.total
    missing = FP32 * sizes.block + table * (not tied)
    return _Gradients(0, table, whole - missing, whole + table * tied)


def _layer_bytes(model: nn.Module, step: Step, *, copies: bool) -> _Layer:
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
    return _Layer(
        kept=kept[step.activation_checkpointing],
        computed_again=everything + spare - kept[step.activation_checkpointing]
        if step.activation_checkpointing != "none"
        else 0,
        # The gradient of a matrix has the dtype of the product and is then copied to fp32.
        working=max(N * working + FP32 * max(matrices), _document_attention_bytes(config, step)),
    )


def _document_attention_bytes(config: GPT2Config | LlamaConfig, step: Step) -> int:
    """Return the working space of attention's backward on CUDA when documents are kept apart.

    FlashAttention sums the gradient of q in fp32 and reserves a block of rows more per document.
    """
    if not (step.documents and step.on_cuda):
        return 0
    A = getattr(config, "attention_width", config.width)
    rows = step.tokens + DOCUMENT_ROWS * step.documents
    return FP32 * A * rows + COMPUTE_BYTES[step.precision] * 4 * A * step.tokens


def _transformers_layer_bytes(model: nn.Module, step: Step, *, copies: bool) -> _Layer:
    config, N = model.config, step.tokens
    low, in_bf16 = COMPUTE_BYTES[step.precision], step.precision == "bf16"
    matrices = [p.numel() for p in model.blocks[0].parameters() if p.dim() >= 2]
    whole = kept_bytes(config, sequences=step.sequences, length=step.length, low=in_bf16)
    everything = whole // len(model.blocks) - low * sum(matrices) * (in_bf16 and not copies)
    selected, working = token_bytes(model.blocks[0], config.width, low)
    kept = {"none": everything, "selective": N * selected, "full": N * FP32 * config.width}
    kept = min(everything, kept[step.activation_checkpointing])
    return _Layer(
        kept=kept,
        computed_again=everything - kept,
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


def _activation_bytes(model: nn.Module, step: Step, layer: _Layer) -> int:
    """Return the bytes kept at the end of forward, by all layers and the final norm."""
    twice = isinstance(model.config, LlamaConfig) and not step.on_cuda
    last_norm = step.tokens * FP32 * model.config.width * (2 if twice else 1)
    return len(model.blocks) * layer.kept + last_norm


def _loss_bytes(model: nn.Module, step: Step) -> int:
    """Return the peak bytes of output projection and loss, whose forward computes gradients too."""
    (V, D), N = model.head_weight.shape, step.tokens
    low, in_bf16 = COMPUTE_BYTES[step.precision], step.precision == "bf16"
    chunk = _chunk_rows(model, step)
    hidden = FP32 * N * D + low * N * D * (2 if in_bf16 else 1)  # with its copy and its gradient
    weight_copy = low * V * D * in_bf16
    several = chunk < N
    # The weight gradient: the sum over chunks, and the product of the current chunk.
    products = _table_gradient_bytes(step, several) * V * D
    if several:
        products += (FP32 if step.on_cuda else FP32 + 2 * low * in_bf16) * V * D
    # The fp32 logits of a chunk, unless compiled; on a CPU they are made in small blocks.
    high = FP32 * chunk * V * (in_bf16 and step.on_cuda and not step.compiled)
    high += FP32 * V * D * several
    return hidden + weight_copy + low * chunk * V + max(high, products)


def _head_backward_bytes(model: nn.Module, step: Step) -> int:
    """Return the bytes of both gradients of the output projection, stored and scaled copies."""
    (V, D), N = model.head_weight.shape, step.tokens
    several = _chunk_rows(model, step) < N
    low = COMPUTE_BYTES[step.precision]
    return 2 * low * N * D + (_table_gradient_bytes(step, several) + FP32) * V * D


def _chunk_rows(model: nn.Module, step: Step) -> int:
    row_bytes = model.head_weight.shape[0] * COMPUTE_BYTES[step.precision]
    return chunk_rows(step.tokens, row_bytes, "cuda" if step.on_cuda else "cpu")


def _table_gradient_bytes(step: Step, several: bool) -> int:
    """Return the bytes per element: fp32 on CUDA, or if several chunks are summed."""
    return FP32 if step.on_cuda or several else COMPUTE_BYTES[step.precision]


def _is_tied(model: nn.Module) -> bool:
    tables = (module.weight for module in model.modules() if isinstance(module, nn.Embedding))
    return any(table is model.head_weight for table in tables)
