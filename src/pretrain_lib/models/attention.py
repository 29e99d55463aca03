"""Causal attention over packed documents: one function. Floor 0."""

import torch
import torch.nn.functional as F

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
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if document_ends is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
    document = document_index(document_ends, q.shape[2])
    same = document[:, :, None] == document[:, None, :]
    mask = same.tril()[:, None]  # (B, 1, T, T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


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
