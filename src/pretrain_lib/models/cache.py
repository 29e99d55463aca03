"""Key-value cache and token-tree attention, for generation and scoring.

Shapes: B rows, H query heads, H_kv key-value heads, T new tokens, S cache slots, D head dimension.
"""

from typing import Any

import torch
import torch.nn.functional as F

from pretrain_lib.models.attention import masked_attention
from pretrain_lib.models.places import check_rows


class KeyValueCache:
    """The keys and values of every layer, for rows that may differ in length.

    `config` is the model's. Each forward appends its T tokens to every row, right-padded in rows
    with fewer new tokens. Afterwards call `advance` with the number of real tokens in each row; the
    next forward overwrites the padding. `slots` must be at least the length of the longest row plus
    its new tokens, including padding. Attention through a cache applies no dropout.
    """

    def __init__(self, config: Any, *, rows: int, slots: int) -> None:
        self.config = config
        self.slots = slots
        self.lengths = torch.zeros(rows, dtype=torch.int64)
        """Tokens in each row, (B,); on the CPU, so that reading it never waits for the device."""
        # Each (B, H_kv, S, D), allocated by the first forward, which knows dtype, device and H_kv.
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def begin(
        self, rows: int, length: int, device: torch.device
    ) -> tuple[torch.Tensor, list["CachedLayer"]]:
        """Begin a forward of (B, T) tokens; return their positions (B, T) and the cached layers.

        The positions of padding may exceed the context length, so positions are clamped to it.
        """
        check_rows(len(self.lengths), rows)
        slots = self.lengths[:, None] + torch.arange(length)  # (B, T)
        extent = int(self.lengths.max()) + length
        if extent > self.slots:
            raise ValueError(f"{extent} tokens do not fit into a cache of slots={self.slots}")
        positions = slots.clamp(max=self.config.context_length - 1).to(device)
        slots = slots.to(device)
        mask = torch.arange(extent, device=device) <= slots[:, :, None]  # (B, T, extent)
        layers = [CachedLayer(self, i, slots, mask) for i in range(self.config.num_layers)]
        return positions, layers

    def advance(self, new: torch.Tensor | int) -> None:
        """Add `new`, the number of real tokens of the last forward, to the lengths.

        `new` is (B,), or one number for all rows. Raises ValueError if a row is now longer than the
        model's context.
        """
        self.lengths = self.lengths + new
        longest, most = int(self.lengths.max()), self.config.context_length
        if longest > most:
            raise ValueError(
                f"a sequence of {longest} tokens is longer than model.context_length={most}"
            )

    def expand(self, rows: torch.Tensor, *, slots: int) -> "KeyValueCache":
        """Return a copy with the given `rows` (N,), which may repeat; `rows` is on the CPU.

        The copy has its own number of `slots` and shares no memory with this cache.
        """
        other = KeyValueCache(self.config, rows=len(rows), slots=slots)
        other.lengths = self.lengths[rows]
        used = int(other.lengths.max())
        for pair in self.layers:
            chosen = rows.to(pair[0].device)
            copies = [stored[:, :, :used].index_select(0, chosen) for stored in pair]
            other.layers.append(tuple(_fit(copy, slots) for copy in copies))
        return other


class CachedLayer:
    """One layer of a `KeyValueCache` during one forward."""

    def __init__(
        self, cache: KeyValueCache, number: int, slots: torch.Tensor, mask: torch.Tensor
    ) -> None:
        self.cache, self.number, self.slots, self.mask = cache, number, slots, mask

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Store the new keys and values, and attend to all tokens of each row so far.

        `q` (B, H, T, D); `k`, `v` (B, H_kv, T, D). Returns (B, H, T, D).
        """
        layers = self.cache.layers
        if len(layers) == self.number:
            shape = (k.shape[0], k.shape[1], self.cache.slots, k.shape[3])
            layers.append((k.new_zeros(shape), v.new_zeros(shape)))
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        seen = []
        for stored, new in zip(layers[self.number], (k, v), strict=True):
            stored[rows, :, self.slots] = new.transpose(1, 2)
            seen.append(stored[:, :, : self.mask.shape[-1]])
        return attend_where(self.mask, q, *seen)


class TokenTrees:
    """Trees of tokens in depth-first order: each token attends to its ancestors and itself.

    Pass it as `cache` to a single forward. `depths` (B, T) are the positions of the tokens; `ends`
    (B, T) are the indices after the last descendant of each: token i attends to token j if
    j <= i < ends[j].
    """

    def __init__(self, config: Any, *, depths: torch.Tensor, ends: torch.Tensor) -> None:
        self.config, self.depths, self.ends = config, depths, ends
        self.mask: torch.Tensor | None = None

    def begin(
        self, rows: int, length: int, device: torch.device
    ) -> tuple[torch.Tensor, list["TokenTrees"]]:
        """Begin a forward; return the positions (B, T) and one object with `attend` per layer."""
        check_rows(len(self.depths), rows)
        depths, ends = self.depths.to(device), self.ends.to(device)
        index = torch.arange(length, device=device)
        # (B, T, T): which tokens each one attends to
        self.mask = (index <= index[:, None]) & (index[:, None] < ends[:, None])
        return depths, [self] * self.config.num_layers

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attend to ancestors. `q` (B, H, T, D); `k`, `v` (B, H_kv, T, D). Returns (B, H, T, D)."""
        return attend_where(self.mask, q, k, v)


def attend_where(
    mask: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """Return attention (B, H, T, D) over the positions where `mask` (B, T, S) is true.

    `q` (B, H, T, D); `k`, `v` (B, H_kv, S, D). The query heads that share a key-value head are
    concatenated along T, so that they form the queries of a single head.
    """
    grouped = q.reshape(k.shape[0], k.shape[1], -1, q.shape[3])  # (B, H_kv, H / H_kv * T, D)
    mask = mask.repeat(1, q.shape[1] // k.shape[1], 1)[:, None]
    return masked_attention(grouped, k, v, mask).reshape(q.shape)


def _fit(kept: torch.Tensor, slots: int) -> torch.Tensor:
    """Pad (B, H_kv, S, D) with zeros, or truncate it, to S = `slots`."""
    return F.pad(kept, (0, 0, 0, slots - kept.shape[2]))


def key_value_heads(config: Any) -> int:
    """Return the number of key-value heads; without grouped-query attention, that of all heads."""
    return getattr(config, "num_key_value_heads", config.num_heads)
