"""Causal attention over packed documents: one function."""

import torch
import torch.nn.functional as F

from pretrain_lib.models.document_attention import attend_in_documents, has_document_kernel

# Shapes: B sequences, H heads, T positions, D width of a head.


def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    document_ends: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attend to earlier positions, within the own document where `document_ends` says so.

    `q` (B, H, T, D); `k`, `v` (B, H_kv, T, D) with H a multiple of H_kv; `document_ends` (B, E)
    as in `document_index`. Returns (B, H, T, D).
    """
    grouped = q.shape[1] != k.shape[1]
    options = {"dropout_p": dropout, "enable_gqa": grouped}
    if document_ends is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
    if has_document_kernel(q) and dropout == 0:
        if grouped:
            groups = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        return attend_in_documents(q, k, v, document_ends)
    document = document_index(document_ends, q.shape[2])
    mask = (document[:, :, None] == document[:, None, :]).tril()[:, None]  # (B, 1, T, T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)


def document_index(document_ends: torch.Tensor, length: int) -> torch.Tensor:
    """Return which document each position belongs to, int64 (B, T).

    `document_ends` (B, E) rises along E: the index after each document's last token, the rest
    filled up with T or more.
    """
    positions = torch.arange(length, device=document_ends.device, dtype=document_ends.dtype)
    positions = positions.expand(document_ends.shape[0], length).contiguous()
    return torch.searchsorted(document_ends.contiguous(), positions, right=True)


def document_positions(document_ends: torch.Tensor, length: int) -> torch.Tensor:
    """Return each position's place within its own document, int64 (B, T)."""
    starts = F.pad(document_ends.to(torch.int64), (1, 0))
    own_start = starts.gather(1, document_index(document_ends, length))
    return torch.arange(length, device=document_ends.device) - own_start
