"""Causal attention, with optional document masking for packed sequences."""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pretrain_lib.models.document_attention import attend_in_documents, has_document_kernel

# Shapes: B sequences, H heads, T positions, D head dimension.

# Without cuDNN, which torch prefers on Hopper and newer: with a mask it builds an execution plan
# for every new shape.
MASKED_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    boundaries: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Return causal attention, restricted to each token's own document if `boundaries` are given.

    `q` (B, H, T, D); `k`, `v` (B, H_kv, T, D) with H a multiple of H_kv; `boundaries` (N + 1,) from
    `document_boundaries`. Returns (B, H, T, D).
    """
    if boundaries is None:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1]
        )
    if has_document_kernel(q) and dropout == 0:
        return attend_in_documents(q, k, v, boundaries)
    B, _, T, _ = q.shape
    tokens = torch.arange(B * T, device=q.device, dtype=boundaries.dtype)
    document = torch.searchsorted(boundaries, tokens, right=True).view(B, T)
    mask = (document[:, :, None] == document[:, None, :]).tril()[:, None]  # (B, 1, T, T)
    return masked_attention(q, k, v, mask, dropout=dropout)


def masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, *, dropout: float = 0.0
) -> torch.Tensor:
    """Return attention over the positions where `mask`, broadcast to (B, H, T, S), is true.

    `q` (B, H, T, D); `k`, `v` (B, H_kv, S, D) with H a multiple of H_kv. Returns (B, H, T, D).
    """
    with sdpa_kernel(MASKED_BACKENDS):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1]
        )


def document_index(document_ends: torch.Tensor, length: int) -> torch.Tensor:
    """Return the index of the document that each position belongs to, int64 (B, T).

    `document_ends` (B, E) is as in `interface.Model`.
    """
    positions = torch.arange(length, device=document_ends.device, dtype=document_ends.dtype)
    positions = positions.expand(document_ends.shape[0], length).contiguous()
    return torch.searchsorted(document_ends.contiguous(), positions, right=True)


def document_positions(document_ends: torch.Tensor, length: int) -> torch.Tensor:
    """Return the position of each token within its own document, int64 (B, T)."""
    starts = F.pad(document_ends.to(torch.int64), (1, 0))
    own_start = starts.gather(1, document_index(document_ends, length))
    return torch.arange(length, device=document_ends.device) - own_start
