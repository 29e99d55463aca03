"""Attention inside the documents of packed windows, at no more than their own cost.

A Python loop over documents would have torch.compile make a graph for each layout, so it stands
behind one operator. Shapes: B sequences, H heads, T positions, D width of a head, E ends.
"""

import inspect
from collections.abc import Iterator

import torch
from torch import library
from torch.nn.attention.varlen import varlen_attn

FLASH_DTYPES = (torch.bfloat16, torch.float16)  # all that the kernels for CUDA take
flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def has_document_kernel(q: torch.Tensor) -> bool:
    """Return whether `attend_in_documents` can take such queries."""
    return q.device.type == "cpu" or (q.device.type == "cuda" and q.dtype in FLASH_DTYPES)


def attend_in_documents(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, document_ends: torch.Tensor
) -> torch.Tensor:
    """Attend causally within documents; `q`, `k`, `v` (B, H, T, D), `document_ends` (B, E).

    Returns (B, H, T, D). The time grows with the sum of the squares of the documents' lengths.
    """
    if q.device.type == "cpu":
        return attend_on_cpu(q, k, v, document_ends)[0]
    return _attend_on_cuda(q, k, v, document_ends)


@library.custom_op("pretrain_lib::document_attention", mutates_args=())
def attend_on_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, document_ends: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attention (B, H, T, D) and each query's log-sum-exp (B, H, T), for backward."""
    out, log_sums = _empty_results(q)
    for part in _documents(document_ends, q.shape[2]):
        out[part], log_sums[part] = flash_attention(q[part], k[part], v[part], 0.0, True)
    return out, log_sums


@library.custom_op("pretrain_lib::document_attention_backward", mutates_args=())
def attend_on_cpu_backward(
    out_grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    log_sums: torch.Tensor,
    document_ends: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, k and v."""
    grads = _empty_like_heads(q), _empty_like_heads(k), _empty_like_heads(v)
    for part in _documents(document_ends, q.shape[2]):
        tensors = (tensor[part] for tensor in (out_grad, q, k, v, out, log_sums))
        for grad, values in zip(grads, flash_attention_backward(*tensors, 0.0, True), strict=True):
            grad[part] = values
    return grads


@attend_on_cpu.register_fake
def _(q, k, v, document_ends):  # noqa: ANN001, ANN202
    return _empty_results(q)


@attend_on_cpu_backward.register_fake
def _(out_grad, q, k, v, out, log_sums, document_ends):  # noqa: ANN001, ANN202
    return _empty_like_heads(q), _empty_like_heads(k), _empty_like_heads(v)


def _keep_for_backward(ctx, inputs, output) -> None:  # noqa: ANN001
    *tensors, document_ends = inputs
    ctx.save_for_backward(*tensors, *output, document_ends)


def _backward(ctx, out_grad, _):  # noqa: ANN001, ANN202
    return *attend_on_cpu_backward(out_grad, *ctx.saved_tensors), None


attend_on_cpu.register_autograd(_backward, setup_context=_keep_for_backward)


def _empty_results(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    B, H, T, _ = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    return _empty_like_heads(q), q.new_empty(B, T, H, dtype=dtype).transpose(1, 2)


def _empty_like_heads(x: torch.Tensor) -> torch.Tensor:
    """Return (B, H, T, D) that lies in memory as (B, T, H, D), as the projections have it."""
    B, H, T, D = x.shape
    return x.new_empty(B, T, H, D).transpose(1, 2)


def _documents(document_ends: torch.Tensor, length: int) -> Iterator[tuple[slice, slice, slice]]:
    """Return the index of each document's part of a tensor (B, H, T, ...)."""
    for row, ends in enumerate(document_ends.tolist()):
        start = 0
        for end in ends:
            end = min(end, length)
            if end > start:
                yield slice(row, row + 1), slice(None), slice(start, end)
            start = end


def _attend_on_cuda(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, document_ends: torch.Tensor
) -> torch.Tensor:
    B, H, T, D = q.shape
    rows = torch.arange(B, device=q.device, dtype=torch.int32)[:, None] * T
    # What fills `document_ends` up becomes documents without a token.
    ends = (document_ends.to(torch.int32).clamp(max=T) + rows).flatten()
    starts = torch.cat([ends.new_zeros(1), ends])
    q, k, v = (x.transpose(1, 2).reshape(B * T, H, D) for x in (q, k, v))
    out = varlen_attn(q, k, v, starts, starts, T, T, **_causal_option())
    return out.view(B, T, H, D).transpose(1, 2)


def _causal_option() -> dict:
    """Return how this torch's kernel is told to look back only: until 2.11 by a flag."""
    if "is_causal" in inspect.signature(varlen_attn).parameters:
        return {"is_causal": True}
    return {"window_size": (-1, 0)}
