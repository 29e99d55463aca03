"""Document masking with fused kernels, whose cost excludes the tokens of other documents.

On a CPU, a loop calls the kernel for each document. It is inside a custom operator, because
torch.compile would otherwise trace a new graph for each layout of documents. Shapes: B sequences, H
heads, T positions, D head dimension, N documents.
"""

import inspect
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import library
from torch.nn.attention.varlen import varlen_attn

FLASH_DTYPES = (torch.bfloat16, torch.float16)  # those that the CUDA kernels support
FLASH_HEAD_WIDTH, FLASH_WIDTH_MULTIPLE, FLASH_CAPABILITY = 256, 8, 8  # maximum, multiple, minimum
MAX_GRID_Y = 65_535  # CUDA's limit; FlashAttention launches a row of blocks for each document
flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def document_boundaries(document_ends: torch.Tensor, length: int) -> torch.Tensor:
    """Return cumulative document lengths over the B x T flattened tokens, int32 (N + 1,).

    They begin with 0 and end with B x T. `document_ends` (B, E) is as in `interface.Model`; each
    padded entry becomes an empty document, and so does what follows an end at T.
    """
    rows = torch.arange(document_ends.shape[0], device=document_ends.device)[:, None]
    ends = F.pad(document_ends.clamp(max=length), (0, 1), value=length) + rows * length
    return torch.cat([ends.new_zeros(1), ends.flatten()]).to(torch.int32)


def has_document_kernel(q: torch.Tensor) -> bool:
    """Return whether `attend_in_documents` supports the device, dtype and head dimension of `q`."""
    if q.device.type != "cuda":
        return q.device.type == "cpu"
    width = q.shape[-1]
    fits = width <= FLASH_HEAD_WIDTH and width % FLASH_WIDTH_MULTIPLE == 0
    recent = torch.cuda.get_device_capability(q.device)[0] >= FLASH_CAPABILITY
    return fits and recent and q.dtype in FLASH_DTYPES


def attend_in_documents(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, boundaries: torch.Tensor
) -> torch.Tensor:
    """Return causal attention within documents, with `boundaries` from `document_boundaries`.

    `q` (B, H, T, D); `k`, `v` (B, H_kv, T, D); `boundaries` (N + 1,). Returns (B, H, T, D). The
    time is proportional to the sum of the squared document lengths.
    """
    on_cpu, grouped = q.device.type == "cpu", q.shape[1] != k.shape[1]
    if grouped and (on_cpu or not _takes("enable_gqa")):
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if on_cpu:
        return attend_on_cpu(q, k, v, boundaries)[0]
    return _attend_on_cuda(q, k, v, boundaries, grouped=grouped)


@library.custom_op("pretrain_lib::document_attention", mutates_args=())
def attend_on_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, boundaries: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention (B, H, T, D) and, for backward, each query's log-sum-exp (B, H, T)."""
    out, log_sums = _empty_results(q)
    for part in _documents(boundaries, q.shape[2]):
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
    boundaries: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, k and v."""
    grads = _empty_like_heads(q), _empty_like_heads(k), _empty_like_heads(v)
    for part in _documents(boundaries, q.shape[2]):
        tensors = (tensor[part] for tensor in (out_grad, q, k, v, out, log_sums))
        for grad, values in zip(grads, flash_attention_backward(*tensors, 0.0, True), strict=True):
            grad[part] = values
    return grads


@attend_on_cpu.register_fake
def _(q, k, v, boundaries):  # noqa: ANN001, ANN202
    return _empty_results(q)


@attend_on_cpu_backward.register_fake
def _(out_grad, q, k, v, out, log_sums, boundaries):  # noqa: ANN001, ANN202
    return _empty_like_heads(q), _empty_like_heads(k), _empty_like_heads(v)


def _keep_for_backward(ctx, inputs, output) -> None:  # noqa: ANN001
    *tensors, boundaries = inputs
    ctx.save_for_backward(*tensors, *output, boundaries)


def _backward(ctx, out_grad, _):  # noqa: ANN001, ANN202
    return *attend_on_cpu_backward(out_grad, *ctx.saved_tensors), None


attend_on_cpu.register_autograd(_backward, setup_context=_keep_for_backward)


def _empty_results(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    B, H, T, _ = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    return _empty_like_heads(q), q.new_empty(B, T, H, dtype=dtype).transpose(1, 2)


def _empty_like_heads(x: torch.Tensor) -> torch.Tensor:
    """Return an empty (B, H, T, D) with the memory layout (B, T, H, D) of the projections."""
    B, H, T, D = x.shape
    return x.new_empty(B, T, H, D).transpose(1, 2)


def _documents(boundaries: torch.Tensor, length: int) -> Iterator[tuple[slice, slice, slice]]:
    """Yield the index of each nonempty document into a tensor (B, H, T, ...)."""
    starts = boundaries.tolist()
    for start, end in zip(starts, starts[1:], strict=False):
        if end > start:
            row, first = divmod(start, length)
            yield slice(row, row + 1), slice(None), slice(first, first + end - start)


def _attend_on_cuda(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, boundaries: torch.Tensor, *, grouped: bool
) -> torch.Tensor:
    B, T = q.shape[0], q.shape[2]
    documents = (boundaries.shape[0] - 1) // B  # per row, empty ones included
    options = _causal_option()
    if grouped and _takes("enable_gqa"):
        options["enable_gqa"] = True
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, T, H, D)
    # torch.compile guards the step of a loop by its value, so that each number of documents would
    # be compiled anew: where one launch is enough, there is none.
    if B * documents <= MAX_GRID_Y:
        out = _attend_to_rows(q, k, v, boundaries, options)
    else:
        rows = max(1, MAX_GRID_Y // documents)  # per kernel launch
        parts = []
        for first in range(0, B, rows):
            last = min(first + rows, B)
            starts = boundaries[first * documents : last * documents + 1] - first * T
            slices = (x[first:last] for x in (q, k, v))
            parts.append(_attend_to_rows(*slices, starts, options))
        out = torch.cat(parts)
    return out.transpose(1, 2)


def _attend_to_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, options: dict
) -> torch.Tensor:
    """Return attention (B, T, H, D) by one launch; all arguments are of the same rows."""
    B, T = q.shape[:2]
    flat = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    out = varlen_attn(*flat, starts, starts, T, T, **options)
    return out.view(B, T, *out.shape[1:])


def _causal_option() -> dict:
    """Return the argument for causal masking: `is_causal` until torch 2.11, then `window_size`."""
    return {"is_causal": True} if _takes("is_causal") else {"window_size": (-1, 0)}


def _takes(option: str) -> bool:
    return option in inspect.signature(varlen_attn).parameters
