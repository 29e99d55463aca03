"""Fused output projection and cross-entropy, which never holds all logits of a batch in memory."""

from contextlib import nullcontext
from functools import cache

import torch
from torch.autograd.function import once_differentiable

from pretrain_lib.data.windows.packing import IGNORED_TARGET
from pretrain_lib.models.token_ids import flatten_checked

# Bytes of a chunk of logits, in the dtype of the matrix products. Chunks are larger on a GPU: each
# one but the first costs a pass over the weight gradient, and a GPU has the memory.
CHUNK_BYTES = {"cpu": 2**28, "mps": 2**28, "meta": 2**28, "cuda": 2**31}
ROWS_MULTIPLE = 128  # chunk rows on CUDA, to fill whole tiles of the matrix products
BLOCK_LOGITS = 2**17  # per thread, so that elementwise operations stay in its cache


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocabulary_size: int | None = None,
    z_loss: float = 0.0,
    compiled: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed next-token loss in nats and the number of targets that are not ignored.

    `hidden` (..., D), `weight` (V_padded, D), `targets` (...) int64 in [0, V) or IGNORED_TARGET.
    Raises ValueError for other shapes, and on a CPU for other targets, which make the loss NaN on a
    GPU. Rows of `weight` from `vocabulary_size` on are padding: they are excluded from the softmax
    and get a zero gradient. `z_loss` is the coefficient of the squared log-sum-exp of each target
    that is not ignored (Chowdhery et al. 2022, section 5): the gradients are those of the loss with
    it, the value returned is the loss without it. Both results have shape (); the loss is in fp32.
    Under autocast, products run in its dtype, log-sum-exp and sum in fp32. `compiled` fuses the
    operations on the logits with torch.compile, which is faster on CUDA.
    """
    vocabulary_size = vocabulary_size or weight.shape[0]
    hidden, targets, factor = flatten_checked(hidden, targets, vocabulary_size)
    if not hidden.is_meta and torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    # Determined here, because gradients are always disabled inside a Function.
    needs_gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss = _LinearCrossEntropy.apply(
        hidden, weight, targets, vocabulary_size, z_loss, compiled, needs_gradients
    )
    return loss * factor, (targets != IGNORED_TARGET).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients in forward, chunk by chunk, so backward needs no logits."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, vocabulary_size, z_loss, compiled, needs_gradients):  # noqa: ANN001, ANN205
        low_weight = weight.to(hidden.dtype)
        hidden_grad = torch.empty_like(hidden) if needs_gradients else None
        weight_grad = None
        chunk = chunk_rows(len(hidden), len(weight) * hidden.element_size(), hidden.device.type)
        # Reuse one buffer: new pages for each chunk would cost as much time as the arithmetic.
        buffer = hidden.new_empty(chunk, len(weight))
        loss = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        off = nullcontext() if hidden.is_meta else torch.autocast(hidden.device.type, enabled=False)
        with off:
            for start in range(0, len(hidden), chunk):
                rows = slice(start, min(start + chunk, len(hidden)))
                logits = torch.mm(hidden[rows], low_weight.T, out=buffer[: rows.stop - start])
                options = (vocabulary_size, z_loss, compiled, needs_gradients)
                loss += _chunk_loss(logits, targets[rows], *options)
                if needs_gradients:  # `_chunk_loss` has replaced the logits by their gradient
                    torch.mm(logits, low_weight, out=hidden_grad[rows])
                    weight_grad = _add_product(weight_grad, logits.T, hidden[rows], weight.dtype)
        if needs_gradients and weight_grad is None:  # of an empty micro-batch
            weight_grad = torch.zeros_like(weight)
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.weight_dtype = weight.dtype
        return loss.float()

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_grad):  # noqa: ANN001, ANN205
        hidden_grad, weight_grad = ctx.saved_tensors
        weight_grad = _scaled(weight_grad, loss_grad, ctx.weight_dtype)
        return _scaled(hidden_grad, loss_grad, hidden_grad.dtype), weight_grad, *(None,) * 5


def _scaled(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a gradient times a factor in `dtype`, where the factor itself may not be exact."""
    high = torch.promote_types(gradient.dtype, torch.float32)
    return gradient.to(high, copy=True).mul_(factor).to(dtype)


def chunk_rows(rows: int, row_bytes: int, device_type: str) -> int:
    """Return the rows per chunk, for the fewest chunks of equal size within `CHUNK_BYTES`.

    Fewer are better, because each chunk costs a pass over the weight gradient.
    """
    chunks = max(1, -(-rows // max(1, CHUNK_BYTES[device_type] // row_bytes)))
    chunk = max(1, -(-rows // chunks))
    if device_type == "cuda" and chunks > 1:
        chunk = -(-chunk // ROWS_MULTIPLE) * ROWS_MULTIPLE
    return chunk


def _add_product(
    total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return `total` + `a` @ `b`, summed in `dtype`."""
    if a.device.type == "cuda" and a.dtype != dtype:  # fused: product in bf16, sum in fp32
        if total is None:
            return torch.mm(a, b, out_dtype=dtype)
        return torch.addmm(total, a, b, out_dtype=dtype)
    if total is None:
        return torch.mm(a, b)  # a single product needs no sum in `dtype`
    return total.to(dtype).add_(torch.mm(a, b).to(dtype))  # a sum of two dtypes is slow on CPUs


def _chunk_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    vocabulary_size: int,
    z_loss: float,
    compiled: bool,
    needs_gradients: bool,
) -> torch.Tensor:
    """Return the summed loss of a chunk.

    `logits` (N, V_padded), `targets` (N,). With `needs_gradients`, the logits are overwritten with
    their gradient.
    """
    if compiled:
        return _compiled_loss()(logits, targets, vocabulary_size, z_loss, needs_gradients)
    rows = len(logits)
    if logits.device.type == "cpu":
        rows = max(1, BLOCK_LOGITS * torch.get_num_threads() // logits.shape[1])
    blocks = zip(logits.split(rows), targets.split(rows), strict=True)
    options = (vocabulary_size, z_loss, needs_gradients)
    return sum(_block_loss(*block, *options) for block in blocks)


def _block_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    vocabulary_size: int,
    z_loss: float,
    needs_gradients: bool,
) -> torch.Tensor:
    """As `_chunk_loss`, with in-place operations: the fastest form without a compiler."""
    high = logits.to(torch.promote_types(logits.dtype, torch.float32))
    x = high[:, :vocabulary_size]
    counts = (targets != IGNORED_TARGET)[:, None]
    picked = targets.clamp(min=0)[:, None]
    top = x.amax(dim=1, keepdim=True)
    x -= top
    picked_logits = x.gather(1, picked)
    total = x.exp_().sum(dim=1, keepdim=True)
    nll, share = total.log() - picked_logits, counts / total
    if z_loss:
        share = share * (1 + 2 * z_loss * (top + total.log()))
    if needs_gradients:
        x *= share  # the softmax, times a factor for the z-loss
        x.scatter_add_(1, picked, -counts.to(x.dtype))
        high[:, vocabulary_size:] = 0
        if high is not logits:
            logits.copy_(high)
    return (nll * counts).sum()


def _loss_for_compiler(
    logits: torch.Tensor,
    targets: torch.Tensor,
    vocabulary_size: int,
    z_loss: float,
    needs_gradients: bool,
) -> torch.Tensor:
    """As `_chunk_loss`, written to compile to two fused kernels that never store fp32 logits.

    The first kernel computes the log-sum-exp; the second rereads the logits and writes the
    gradient.
    """
    high = logits.to(torch.promote_types(logits.dtype, torch.float32))
    column = torch.arange(logits.shape[1], device=logits.device)
    if vocabulary_size < logits.shape[1]:
        high = torch.where(column < vocabulary_size, high, -torch.inf)
    counts = (targets != IGNORED_TARGET)[:, None]
    picked = targets.clamp(min=0)[:, None]
    normalizer = high.logsumexp(dim=1, keepdim=True)
    nll, share = normalizer - logits.gather(1, picked), counts.to(high.dtype)
    if needs_gradients:
        if z_loss:
            share = share * (1 + 2 * z_loss * normalizer)
        target = (column == picked) & counts
        logits.copy_((high - normalizer).exp() * share - target.to(high.dtype))
    return (nll * counts).sum()


@cache
def _compiled_loss():  # noqa: ANN202
    return torch.compile(_loss_for_compiler)
