"""Sequences that begin alike, as a tree: what they share is read once. Floor 0.

Shapes: B rows, H heads (H_kv of keys and values), T tokens, D width of a head.
"""

from typing import Any

import torch
import torch.nn.functional as F


class TokenTrees:
    """Rows of tokens in depth-first order, each of which sees the path from its root to itself.

    Takes a cache's place in a model's forward, for one forward. `depths` (B, T) are the positions;
    `ends` (B, T) say where the tokens below each one end: token i sees j if j <= i < ends[j].
    """

    def __init__(self, config: Any, *, depths: torch.Tensor, ends: torch.Tensor) -> None:
        self.config, self.depths, self.ends = config, depths, ends
        self.mask: torch.Tensor | None = None

    def begin(self, length: int, device: torch.device) -> tuple[torch.Tensor, list["TokenTrees"]]:
        """Return the positions (B, T), and what each layer attends by."""
        depths, ends = self.depths.to(device), self.ends.to(device)
        index = torch.arange(length, device=device)
        # (B, T, T): which tokens each one sees
        self.mask = (index <= index[:, None]) & (index[:, None] < ends[:, None])
        return depths, [self] * self.config.num_layers

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attend to the paths. `q` (B, H, T, D); `k`, `v` (B, H_kv, T, D). Returns (B, H, T, D)."""
        # Heads that share keys and values stand one after another, as queries of one head.
        grouped = q.reshape(k.shape[0], k.shape[1], -1, q.shape[3])  # (B, H_kv, H / H_kv * T, D)
        mask = self.mask.repeat(1, q.shape[1] // k.shape[1], 1)[:, None]
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).reshape(q.shape)
