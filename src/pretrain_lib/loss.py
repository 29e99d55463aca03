"""The head and its cross-entropy in one, so that the logits of a batch never exist at once.

Floor 0.
"""

import torch
from torch.autograd.function import once_differentiable

IGNORED_TARGET = -100
CHUNK_LOGITS = 2**26  # at most so many logits (fp32: 256 MiB) are alive at a time


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocabulary_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed next-token loss in nats and the number of targets that count in it.

    `hidden` (..., D), `weight` (V_padded, D), `targets` (...) int64 in [0, V) or IGNORED_TARGET.
    Rows of `weight` from `vocabulary_size` on are padding: outside every softmax, gradient zero.
    Both results have shape (), the loss in fp32. Under autocast the matrix products run in its
    dtype; log-sum-exp and the sum stay in fp32.
    """
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    vocabulary_size = vocabulary_size or weight.shape[0]
    loss = _LinearCrossEntropy.apply(hidden, weight, targets, vocabulary_size)
    return loss, (targets != IGNORED_TARGET).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients chunk by chunk in forward, while a chunk's logits are at hand."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, vocabulary_size):  # noqa: ANN001, ANN205
        needs_gradients = any(ctx.needs_input_grad[:2])
        low_weight = weight.to(hidden.dtype)
        hidden_grad = torch.empty_like(hidden) if needs_gradients else None
        weight_grad = torch.zeros_like(weight) if needs_gradients else None
        partial_grad = torch.empty_like(low_weight) if needs_gradients else None
        chunk = _chunk_rows(len(hidden), weight)
        # One buffer for all chunks: fresh pages for each would cost as much as the arithmetic.
        buffer = hidden.new_empty(chunk, len(weight))
        high = buffer if hidden.dtype == torch.float64 else buffer.float()
        loss = torch.zeros((), dtype=high.dtype, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), chunk):
                rows = slice(start, start + chunk)
                size = len(hidden[rows])
                low, logits = buffer[:size], high[:size]
                logits.copy_(torch.mm(hidden[rows], low_weight.T, out=low))
                loss += _loss_and_gradient_in_place(logits, targets[rows], vocabulary_size)
                if needs_gradients:
                    torch.mm(low.copy_(logits), low_weight, out=hidden_grad[rows])
                    weight_grad += torch.mm(low.T, hidden[rows], out=partial_grad)
        ctx.save_for_backward(hidden_grad, weight_grad)
        return loss.float()

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_grad):  # noqa: ANN001, ANN205
        hidden_grad, weight_grad = ctx.saved_tensors
        scale = loss_grad.to(weight_grad.dtype)
        return hidden_grad * scale.to(hidden_grad.dtype), weight_grad * scale, None, None


def _chunk_rows(rows: int, weight: torch.Tensor) -> int:
    """Return the rows of equal chunks: small, to stay near the processor, but not too many.

    Each costs a pass over the gradient of `weight` (V_padded, D), which 2 D rows pay for.
    """
    at_most = max(1, min(CHUNK_LOGITS // weight.shape[0], 2 * weight.shape[1]))
    chunks = max(1, -(-rows // at_most))
    return max(1, -(-rows // chunks))


def _loss_and_gradient_in_place(
    logits: torch.Tensor, targets: torch.Tensor, vocabulary_size: int
) -> torch.Tensor:
    """Return the summed loss of a chunk and turn its logits (N, V_padded) into their gradient."""
    counts = (targets != IGNORED_TARGET)[:, None]
    picked = targets.clamp(min=0)[:, None]
    logits[:, vocabulary_size:] = -torch.inf
    logits -= logits.amax(dim=1, keepdim=True)
    picked_logits = logits.gather(1, picked)
    normalizer = logits.exp_().sum(dim=1, keepdim=True)
    nll = normalizer.log() - picked_logits
    logits *= counts / normalizer  # the softmax
    logits.scatter_add_(1, picked, -counts.to(logits.dtype))
    return (nll * counts).sum()
