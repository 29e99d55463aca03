"""Estimate the peak memory of a training step from shapes alone.

The estimate adds up the tensors that GPT-2 and LLaMA keep for backward, operator by operator,
without dropout; for other families see `transformers_memory`. Of compilation, what counts most is
taken into account.

Shapes: N tokens of a micro-batch, D width, V rows of the output projection.
"""

from dataclasses import dataclass

from torch import nn

from pretrain_lib.models.llama import LlamaConfig
from pretrain_lib.models.loss import chunk_rows
from pretrain_lib.models.transformers_config import CausalLMConfig
from pretrain_lib.plan.layers import Layer, layer_bytes
from pretrain_lib.plan.muon import muon_cost
from pretrain_lib.plan.network import FP32, Sizes, World
from pretrain_lib.plan.step import COMPUTE_BYTES, Step
from pretrain_lib.plan.transformers_memory import logits_bytes

GATHERED_LAYERS = 2  # of a sharded model, at a time: the current one and the prefetched next one


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
    layer = layer_bytes(model, step, copies=world.gather_bytes == FP32)
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
        shard = FP32 * sizes.total // world.group
        in_flight = FP32 * min(GATHERED_LAYERS, sizes.num_layers) * sizes.block
        root = FP32 * sizes.root
        return _Gradients(0, table + in_flight, shard + root + in_flight, shard + root)
    whole = FP32 * sizes.total
    missing = FP32 * sizes.block + table * (not tied)
    return _Gradients(0, table, whole - missing, whole + table * tied)


def _activation_bytes(model: nn.Module, step: Step, layer: Layer) -> int:
    """Return the bytes kept at the end of forward, by all layers and the final norm."""
    twice = isinstance(model.config, LlamaConfig) and not step.on_cuda
    last_norm = step.tokens * FP32 * model.config.width * (2 if twice else 1)
    return len(model.blocks) * layer.kept + last_norm


def _loss_bytes(model: nn.Module, step: Step) -> int:
    """Return the peak bytes of output projection and loss, whose forward computes gradients too."""
    if _makes_its_logits(model):
        return _own_logits_bytes(model, step)
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
    if _makes_its_logits(model):
        return _own_logits_bytes(model, step)
    (V, D), N = model.head_weight.shape, step.tokens
    several = _chunk_rows(model, step) < N
    low = COMPUTE_BYTES[step.precision]
    return 2 * low * N * D + (_table_gradient_bytes(step, several) + FP32) * V * D


def _makes_its_logits(model: nn.Module) -> bool:
    return isinstance(model.config, CausalLMConfig) and not model.has_plain_head


def _own_logits_bytes(model: nn.Module, step: Step) -> int:
    """Return the peak bytes of logits that the model makes itself, reached in backward."""
    (V, D), N = model.head_weight.shape, step.tokens
    rows, low = _chunk_rows(model, step), step.precision == "bf16"
    # Hidden states and their gradient, and the sum of the weight gradients of several chunks.
    whole = 2 * FP32 * N * D + FP32 * V * D * (rows < N)
    return whole + logits_bytes(model.config, rows=rows, low=low)


def _chunk_rows(model: nn.Module, step: Step) -> int:
    itemsize = FP32 if _makes_its_logits(model) else COMPUTE_BYTES[step.precision]
    row_bytes = model.head_weight.shape[0] * itemsize
    return chunk_rows(step.tokens, row_bytes, "cuda" if step.on_cuda else "cpu")


def _table_gradient_bytes(step: Step, several: bool) -> int:
    """Return the bytes per element: fp32 on CUDA, or if several chunks are summed."""
    return FP32 if step.on_cuda or several else COMPUTE_BYTES[step.precision]


def _is_tied(model: nn.Module) -> bool:
    tables = (module.weight for module in model.modules() if isinstance(module, nn.Embedding))
    return any(table is model.head_weight for table in tables)
