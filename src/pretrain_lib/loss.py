"""The head and its cross-entropy in one, so that the logits of a batch never exist at once.

Floor 0.
"""

import torch

IGNORED_TARGET = -100
CHUNK_LOGITS = 2**25  # at most so many logits (fp32: 128 MiB) are alive at a time


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
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        chunk = max(1, CHUNK_LOGITS // weight.shape[0])
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), chunk):
                rows = slice(start, start + chunk)
                logits = (hidden[rows] @ low_weight.T).to(_accumulation_dtype(hidden))
                chunk_loss = _loss_and_gradient_in_place(logits, targets[rows], vocabulary_size)
                loss += chunk_loss.to(loss.dtype)
                if needs_gradients:
                    gradient = logits.to(hidden.dtype)
                    torch.mm(gradient, low_weight, out=hidden_grad[rows])
                    weight_grad += gradient.T @ hidden[rows]
        ctx.save_for_backward(hidden_grad, weight_grad)
        return loss

    @staticmethod
    def backward(ctx, loss_grad):  # noqa: ANN001, ANN205
        hidden_grad, weight_grad = ctx.saved_tensors
        scale = loss_grad.to(weight_grad.dtype)
        return hidden_grad * scale.to(hidden_grad.dtype), weight_grad * scale, None, None


def _accumulation_dtype(hidden: torch.Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _loss_and_gradient_in_place(
    logits: torch.Tensor, targets: torch.Tensor, vocabulary_size: int
) -> torch.Tensor:
    """Return the summed loss of a chunk and turn its logits (N, V_padded) into their gradient."""
    counts = targets != IGNORED_TARGET
    picked = targets.clamp(min=0)[:, None]
    logits[:, vocabulary_size:] = -torch.inf
    log_normalizer = logits.logsumexp(dim=1, keepdim=True)
    nll = (log_normalizer - logits.gather(1, picked))[:, 0]
    logits.sub_(log_normalizer).exp_()  # the softmax
    logits.scatter_add_(1, picked, -torch.ones_like(picked, dtype=logits.dtype))
    logits.mul_(counts[:, None])
    return (nll * counts).sum()
