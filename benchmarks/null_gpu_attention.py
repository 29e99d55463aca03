"""Attention over packed documents on the null GPU, by how many there are."""

from typing import Any

import torch
from null_gpu_counts import CallLog

from pretrain_lib.models.attention import causal_attention
from pretrain_lib.models.document_attention import document_boundaries

HEADS, HEAD_WIDTH, LENGTH = 12, 64, 1024


def count_attention(batch: int, documents: int) -> dict[str, Any]:
    """Attend over rows of so many documents, forward and backward, as a layer of GPT-2 124M does.

    Returns blocks of the forward kernel's largest launch, launches, and bytes allocated beside
    queries, keys, values and their gradients. Without documents: plain attention.
    """
    shape = (batch, LENGTH, HEADS, HEAD_WIDTH)
    q, k, v = (
        torch.zeros(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for _ in range(3)
    )
    boundaries = None
    if documents:
        ends = torch.arange(1, documents + 1).expand(batch, -1) * (LENGTH // documents)
        boundaries = document_boundaries(ends.to("cuda", torch.int32), LENGTH)
    log = CallLog()
    log.take()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    causal_attention(q, k, v, boundaries=boundaries).backward(torch.zeros_like(q))
    calls = log.take()
    forward = {name: n for name, n in calls.kernels.items() if "flash_fwd" in name}
    return {
        "forward_blocks": sum(calls.grids[name] for name in forward),
        "forward_launches": sum(forward.values()),
        "refused": dict(calls.refused),
        "peak": torch.cuda.max_memory_allocated() - before,
    }
