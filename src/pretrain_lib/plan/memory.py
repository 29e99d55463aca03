"""What a training step holds in memory at its peak, from shapes alone.

Counted is what our models' forward keeps for backward, operator by operator, without dropout. A
compiler keeps somewhat less of the blocks; of the loss it is counted. Shapes: N tokens of a
micro-batch, D width, F width inside the MLP, H heads, V rows of the head's table.
"""

from dataclasses import dataclass

from torch import nn

from pretrain_lib.models.gpt2 import GPT2Config
from pretrain_lib.models.llama import LlamaConfig
from pretrain_lib.models.loss import chunk_rows
from pretrain_lib.plan.network import FP32, Sizes, World

COMPUTE_BYTES = {"bf16": 2, "fp32": 4}
MOMENTS_BYTES = {"fp32": 8, "bf16": 4}  # both of Adam's, for a parameter
GATHERED_LAYERS = 2  # at a time, of a sharded model: one is computed, the next one is fetched


@dataclass(frozen=True)
class Step:
    """What a device does in a step, as far as its memory depends on it."""

    sequences: int
    """Of a micro-batch."""
    length: int
    """Tokens of a sequence."""
    micro_batches: int = 1
    precision: str = "bf16"
    """bf16 (autocast) or fp32, of the matrix products."""
    activation_checkpointing: str = "none"
    moments: str = "fp32"
    on_cuda: bool = True
    """On a CPU LLaMA's norms keep more, and the loss works in smaller blocks."""
    compiled: bool = True
    """On CUDA the compiled loss holds no logits in fp32."""

    @property
    def tokens(self) -> int:
        """Of a micro-batch (N)."""
        return self.sequences * self.length


@dataclass(frozen=True)
class Memory:
    """Bytes of one device. Gradients come as activations go: the peak is less than the sum."""

    weights: int
    gradients: int
    """Kept until the update; of a sharded model whole where micro-batches are accumulated."""
    moments: int
    buffers: int
    """DDP's buckets, or the weights that a sharded model has gathered."""
    activations: int
    """Kept from forward to backward, copies of weights in bf16 included."""
    loss: int
    """Added by head and loss at their height."""
    peak: int


@dataclass(frozen=True)
class _Layer:
    """Bytes of a layer."""

    kept: int
    """From forward to backward."""
    computed_again: int
    """On top, while its backward runs."""
    working: int
    """On top of both, what its backward itself needs at most."""


@dataclass(frozen=True)
class _Gradients:
    """Bytes of gradients at four times of a step, whole or shared out."""

    before: int
    """When forward begins: those of the micro-batches before."""
    at_last_layer: int
    at_first_layer: int
    after: int
    """When backward ends."""


def model_sizes(model: nn.Module) -> Sizes:
    """Return the numbers of parameters of one of our models; on the meta device too."""
    total = sum(parameter.numel() for parameter in model.parameters())
    block = sum(parameter.numel() for parameter in model.blocks[0].parameters())
    return Sizes(total=total, block=block, num_layers=len(model.blocks))


def estimate_memory(model: nn.Module, step: Step, world: World | None = None) -> Memory:
    """Return the memory of a device in a step of one of our models, from the second step on."""
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
    if world.is_sharded:  # evaluation gathers the whole model, and has no gradients
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
        # Sharded ones too are whole until the last micro-batch. What comes new is added to them,
        # a tied head's only together with the embedding's.
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
    """Return what a layer keeps; `copies` is whether it makes its own of the weights in bf16."""
    config, N = model.config, step.tokens
    matrices = [p.numel() for p in model.blocks[0].parameters() if p.dim() == 2]
    is_gpt2 = isinstance(config, GPT2Config)
    whole, selected, working = (_gpt2_token if is_gpt2 else _llama_token)(config, step)
    low = COMPUTE_BYTES[step.precision]
    copied = low * sum(matrices) if copies and step.precision == "bf16" else 0
    everything = N * whole + copied
    kept = {"none": everything, "selective": N * selected, "full": N * FP32 * config.width}
    # Selectively kept are two results of width D that backward does not need.
    spare = 2 * low * config.width * N * (step.activation_checkpointing == "selective")
    return _Layer(
        kept=kept[step.activation_checkpointing],
        computed_again=everything + spare - kept[step.activation_checkpointing]
        if step.activation_checkpointing != "none"
        else 0,
        # A matrix's gradient comes in the dtype of the product, and is copied to fp32.
        working=N * working + FP32 * max(matrices),
    )


def _gpt2_token(config: GPT2Config, step: Step) -> tuple[int, int, int]:
    """Return bytes a token: kept whole, kept selectively, and working space of backward."""
    D, H, low = config.width, config.num_heads, COMPUTE_BYTES[step.precision]
    log_sums = 4 * H
    # Both norms: input, mean and deviation in fp32, output; query, key, value; attention; the MLP's
    # middle before and after GELU.
    whole = 2 * (4 * D + 8) + low * (2 * D + 3 * D + D + 8 * D) + log_sums
    # The residual stream; query, key, value; attention; what is added twice; the MLP's middle.
    selected = 4 * D + low * (3 * D + D + 2 * D + 4 * D) + log_sums
    # The MLP's second layer: its gradient in fp32, and that of its input; in bf16 two copies more.
    working = 4 * D + low * 4 * D + 4 * D * (step.precision == "bf16")
    return whole, selected, working


def _llama_token(config: LlamaConfig, step: Step) -> tuple[int, int, int]:
    """Return bytes a token: kept whole, kept selectively, and working space of backward."""
    D, F, H, low = config.width, config.mlp_width, config.num_heads, COMPUTE_BYTES[step.precision]
    key_value = 2 * D * config.num_key_value_heads // H
    log_sums = 4 * H
    # A CPU's norms keep their input also as divided by its deviation.
    norms = 2 * (4 * D * (1 if step.on_cuda else 2) + 4)
    # Five layers take the norms' outputs, and under autocast each makes its own copy.
    copies = 5 if step.precision == "bf16" else 2
    # Query, key and value; attention; gate before and after SiLU, up, and their product.
    whole = norms + low * (copies * D + D + key_value + D + 4 * F) + log_sums
    # The residual stream; query, key, value; attention; what is added twice; gate and up.
    selected = 4 * D + low * (D + key_value + D + 2 * D + 2 * F) + log_sums
    # The product of gate and up: the gradients of both.
    return whole, selected, 4 * D + low * 2 * F


def _activation_bytes(model: nn.Module, step: Step, layer: _Layer) -> int:
    """Return what is kept when forward has ended: that of all layers, and the last norm's."""
    twice = isinstance(model.config, LlamaConfig) and not step.on_cuda
    last_norm = step.tokens * FP32 * model.config.width * (2 if twice else 1)
    return len(model.blocks) * layer.kept + last_norm


def _loss_bytes(model: nn.Module, step: Step) -> int:
    """Return what head and loss need in forward, where they compute their gradients too."""
    (V, D), N = model.head_weight.shape, step.tokens
    low, in_bf16 = COMPUTE_BYTES[step.precision], step.precision == "bf16"
    chunk = _chunk_rows(model, step)
    hidden = FP32 * N * D + low * N * D * (2 if in_bf16 else 1)  # with its copy, and its gradient
    weight_copy = low * V * D * in_bf16
    several = chunk < N
    # The gradient of the table: what the chunks' products are added to, and what comes new.
    products = _table_gradient_bytes(step, several) * V * D
    if several:
        products += (FP32 if step.on_cuda else FP32 + 2 * low * in_bf16) * V * D
    # A chunk's logits in fp32, unless compiled; a CPU makes them in small blocks.
    high = FP32 * chunk * V * (in_bf16 and step.on_cuda and not step.compiled)
    high += FP32 * V * D * several
    return hidden + weight_copy + low * chunk * V + max(high, products)


def _head_backward_bytes(model: nn.Module, step: Step) -> int:
    """Return both gradients of the head as they were kept, and scaled."""
    (V, D), N = model.head_weight.shape, step.tokens
    several = _chunk_rows(model, step) < N
    low = COMPUTE_BYTES[step.precision]
    return 2 * low * N * D + (_table_gradient_bytes(step, several) + FP32) * V * D


def _chunk_rows(model: nn.Module, step: Step) -> int:
    row_bytes = model.head_weight.shape[0] * COMPUTE_BYTES[step.precision]
    return chunk_rows(step.tokens, row_bytes, "cuda" if step.on_cuda else "cpu")


def _table_gradient_bytes(step: Step, several: bool) -> int:
    """Return the bytes of an element: fp32 on CUDA, or where several chunks are added."""
    return FP32 if step.on_cuda or several else COMPUTE_BYTES[step.precision]


def _is_tied(model: nn.Module) -> bool:
    return isinstance(model.config, GPT2Config) or model.config.tied_head
