"""Estimate the peak memory of a training step from shapes alone.

The estimate adds up the tensors that GPT-2 and LLaMA keep for backward, operator by operator,
without dropout. Compilation of the loss is taken into account; compiled blocks keep somewhat less
than estimated. Shapes: N tokens of a micro-batch, D width, F hidden width of the MLP, H heads, V
rows of the output projection.
"""

from dataclasses import dataclass

from torch import nn

from pretrain_lib.models.gpt2 import GPT2Config
from pretrain_lib.models.llama import LlamaConfig
from pretrain_lib.models.loss import chunk_rows
from pretrain_lib.plan.network import FP32, Sizes, World

COMPUTE_BYTES = {"bf16": 2, "fp32": 4}
MOMENTS_BYTES = {"fp32": 8, "bf16": 4}  # both of Adam's moments, per parameter
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
    on_cuda: bool = True
    """On a CPU, the norms of LLaMA keep more, and the loss is computed in smaller blocks."""
    compiled: bool = True
    """On CUDA, the compiled loss stores no fp32 logits."""

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
    """Return the parameter counts of a GPT-2 or LLaMA, which may be on the meta device."""
    total = sum(parameter.numel() for parameter in model.parameters())
    block = sum(parameter.numel() for parameter in model.blocks[0].parameters())
    return Sizes(total=total, block=block, num_layers=len(model.blocks))


def estimate_memory(model: nn.Module, step: Step, world: World | None = None) -> Memory:
    """Estimate the memory per device of a training step, from the second step on."""
    world, sizes = world or World(), model_sizes(model)
    weights = FP32 * sizes.total // world.group
    moments = MOMENTS_BYTES[step.moments] * sizes.total // world.group
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
    ]
    if world.is_sharded:  # evaluation gathers the whole model, without gradients
        peaks.append(FP32 * sizes.total - buffers)
    peak = weights + moments + buffers + max(peaks)
    kept = max(weights, gradients.before)
    return Memory(weights, kept, moments, buffers, activations, loss, peak)


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
    matrices = [p.numel() for p in model.blocks[0].parameters() if p.dim() == 2]
    is_gpt2 = isinstance(config, GPT2Config)
    whole, selected, working = (_gpt2_token if is_gpt2 else _llama_token)(config, step)
    low = COMPUTE_BYTES[step.precision]
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
    key_value = 2 * D * config.num_key_value_heads // H
    log_sums = 4 * H
    # On a CPU, norms also keep their normalized input.
    norms = 2 * (4 * D * (1 if step.on_cuda else 2) + 4)
    # Five linear layers take the outputs of the norms; under autocast, each makes its own copy.
    copies = 5 if step.precision == "bf16" else 2
    # q, k and v, attention output, gate before and after SiLU, up, and their product.
    whole = norms + low * (copies * D + D + key_value + D + 4 * F) + log_sums
    # Residual stream, q, k and v, attention output, both residual branches, gate and up.
    selected = 4 * D + low * (D + key_value + D + 2 * D + 2 * F) + log_sums
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
    return isinstance(model.config, GPT2Config) or model.config.tied_head
