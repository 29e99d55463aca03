"""The head and its cross-entropy in one, so that the logits of a batch never exist at once."""

from functools import cache

import torch
from torch.autograd.function import once_differentiable

from pretrain_lib.data.windows.packing import IGNORED_TARGET

CHUNK_BYTES = 2**28  # of logits alive at a time, in the dtype of the matrix products
BLOCK_LOGITS = 2**17  # a thread's, so that what is done to them one by one stays in its cache


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocabulary_size: int | None = None,
    z_loss: float = 0.0,
    compiled: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed next-token loss in nats and the number of targets that count in it.

    `hidden` (..., D), `weight` (V_padded, D), `targets` (...) int64 in [0, V) or IGNORED_TARGET.
    Rows of `weight` from `vocabulary_size` on are padding: outside every softmax, gradient zero.
    `z_loss` times the squared log-sum-exp of each counted row is added (Chowdhery et al. 2022,
    section 5). Both results have shape (), the loss in fp32. Under autocast the matrix products run
    in its dtype; log-sum-exp and the sum stay in fp32. `compiled` has torch.compile make one kernel
    of what is done to the logits, which pays on CUDA.
    """
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    vocabulary_size = vocabulary_size or weight.shape[0]
    loss = _LinearCrossEntropy.apply(hidden, weight, targets, vocabulary_size, z_loss, compiled)
    return loss, (targets != IGNORED_TARGET).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients chunk by chunk in forward, while a chunk's logits are at hand."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, vocabulary_size, z_loss, compiled):  # noqa: ANN001, ANN205
        needs_gradients = any(ctx.needs_input_grad[:2])
        low_weight = weight.to(hidden.dtype)
        hidden_grad = torch.empty_like(hidden) if needs_gradients else None
        weight_grad = None
        chunk = chunk_rows(len(hidden), len(weight) * hidden.element_size())
        # One buffer for all chunks: fresh pages for each would cost as much as the arithmetic.
        buffer = hidden.new_empty(chunk, len(weight))
        loss = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), chunk):
                rows = slice(start, min(start + chunk, len(hidden)))
                logits = torch.mm(hidden[rows], low_weight.T, out=buffer[: rows.stop - start])
                loss += _turn_into_gradient(
                    logits, targets[rows], vocabulary_size, z_loss, compiled
                )
                if needs_gradients:
                    torch.mm(logits, low_weight, out=hidden_grad[rows])
                    weight_grad = _add_product(weight_grad, logits.T, hidden[rows], weight.dtype)
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.weight_dtype = weight.dtype
        return loss.float()

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_grad):  # noqa: ANN001, ANN205
        hidden_grad, weight_grad = ctx.saved_tensors
        scale = loss_grad.to(ctx.weight_dtype)
        weight_grad = weight_grad.to(ctx.weight_dtype, copy=True).mul_(scale)
        return hidden_grad * scale.to(hidden_grad.dtype), weight_grad, None, None, None, None


def chunk_rows(rows: int, row_bytes: int) -> int:
    """Return the rows of equal chunks, as few as fit: each costs a pass over the weight's size."""
    chunks = max(1, -(-rows // max(1, CHUNK_BYTES // row_bytes)))
    return max(1, -(-rows // chunks))


def _add_product(
    total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return `total` + `a` @ `b`, summed in `dtype`; one product alone stays in its own."""
    if total is None:
        return torch.mm(a, b)
    return total.to(dtype).add_(torch.mm(a, b).to(dtype))  # a sum of two dtypes is slow on CPUs


def _turn_into_gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    vocabulary_size: int,
    z_loss: float,
    compiled: bool,
) -> torch.Tensor:
    """Return the summed loss of a chunk and turn its logits into their gradient, in place."""
    if compiled:
        return _compiled_turn_block()(logits, targets, vocabulary_size, z_loss)
    rows = len(logits)
    if logits.device.type == "cpu":
        rows = max(1, BLOCK_LOGITS * torch.get_num_threads() // logits.shape[1])
    blocks = zip(logits.split(rows), targets.split(rows), strict=True)
    return sum(_turn_block_into_gradient(*block, vocabulary_size, z_loss) for block in blocks)


def _turn_block_into_gradient(
    logits: torch.Tensor, targets: torch.Tensor, vocabulary_size: int, z_loss: float
) -> torch.Tensor:
    """As `_turn_into_gradient`; `logits` (N, V_padded), `targets` (N)."""
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
        normalizer = top + total.log()
        nll += z_loss * normalizer**2
        share = share * (1 + 2 * z_loss * normalizer)
    x *= share  # the softmax, but for the z-loss
    x.scatter_add_(1, picked, -counts.to(x.dtype))
    high[:, vocabulary_size:] = 0
    if high is not logits:
        logits.copy_(high)
    return (nll * counts).sum()


@cache
def _compiled_turn_block():  # noqa: ANN202
    return torch.compile(_turn_block_into_gradient)
