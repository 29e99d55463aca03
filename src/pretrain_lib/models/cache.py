"""What tokens attend to beside their own row so far: keys and values kept, and trees.

Shapes: B rows, H heads (H_kv of keys and values), T new tokens, S slots, D width of a head.
"""

from typing import Any

import torch
import torch.nn.functional as F

from pretrain_lib.models.attention import masked_attention


class KeyValueCache:
    """The keys and values of every layer, for rows that may differ in length.

    `config` is that of the model. The T tokens of a forward go to the slots that follow a row's
    own `lengths`, right-padded where a row has fewer; then `advance` says how many of them were
    real, and the next forward overwrites the rest. `slots` holds the longest row and its new
    tokens, pads included. Attention through a cache has no dropout.
    """

    def __init__(self, config: Any, *, rows: int, slots: int) -> None:
        self.config = config
        self.slots = slots
        self.lengths = torch.zeros(rows, dtype=torch.int64)
        """Tokens in each row, (B,), on the CPU: its bookkeeping never waits for a device."""
        # Each (B, H_kv, S, D), made by the first forward, which knows dtype, device and heads.
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def begin(self, length: int, device: torch.device) -> tuple[torch.Tensor, list["CachedLayer"]]:
        """Return the positions (B, T) of the next `length` tokens, and what each layer attends by.

        Positions of pads may lie past the context: they are held inside it.
        """
        slots = self.lengths[:, None] + torch.arange(length)  # (B, T)
        extent = int(self.lengths.max()) + length
        assert extent <= self.slots, f"{extent} tokens in a cache of {self.slots} slots"
        positions = slots.clamp(max=self.config.context_length - 1).to(device)
        slots = slots.to(device)
        mask = torch.arange(extent, device=device) <= slots[:, :, None]  # (B, T, extent)
        layers = [CachedLayer(self, i, slots, mask) for i in range(self.config.num_layers)]
        return positions, layers

    def advance(self, new: torch.Tensor | int) -> None:
        """Count the real tokens of the last forward, `new` (B,) or as many in every row.

        Raises ValueError for a row that has outgrown the model's context.
        """
        self.lengths = self.lengths + new
        longest, most = int(self.lengths.max()), self.config.context_length
        if longest > most:
            raise ValueError(
                f"a sequence of {longest} tokens is longer than model.context_length={most}"
            )

    def expand(self, rows: torch.Tensor, *, slots: int) -> "KeyValueCache":
        """Return a copy of the chosen `rows` (N,), on the CPU, each as often as it is named.

        It has `slots` of its own, and what is added to it does not show here.
        """
        other = KeyValueCache(self.config, rows=len(rows), slots=slots)
        other.lengths = self.lengths[rows]
        used = int(other.lengths.max())
        for pair in self.layers:
            chosen = rows.to(pair[0].device)
            copies = [kept[:, :, :used].index_select(0, chosen) for kept in pair]
            other.layers.append(tuple(_fit(copy, slots) for copy in copies))
        return other


class CachedLayer:
    """One layer of a cache during one forward."""

    def __init__(
        self, cache: KeyValueCache, number: int, slots: torch.Tensor, mask: torch.Tensor
    ) -> None:
        self.cache, self.number, self.slots, self.mask = cache, number, slots, mask

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Keep the new keys and values, and attend to all that a row has so far.

        `q` (B, H, T, D); `k`, `v` (B, H_kv, T, D). Returns (B, H, T, D).
        """
        layers = self.cache.layers
        if len(layers) == self.number:
            shape = (k.shape[0], k.shape[1], self.cache.slots, k.shape[3])
            layers.append((k.new_zeros(shape), v.new_zeros(shape)))
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        seen = []
        for kept, new in zip(layers[self.number], (k, v), strict=True):
            kept[rows, :, self.slots] = new.transpose(1, 2)
            seen.append(kept[:, :, : self.mask.shape[-1]])
        return attend_where(self.mask, q, *seen)


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
        return attend_where(self.mask, q, k, v)


def attend_where(
    mask: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """Attend where `mask` (B, T, S) is true; `q` (B, H, T, D), `k`, `v` (B, H_kv, S, D).

    Heads that share keys and values stand one after another, as queries of one head.
    """
    grouped = q.reshape(k.shape[0], k.shape[1], -1, q.shape[3])  # (B, H_kv, H / H_kv * T, D)
    mask = mask.repeat(1, q.shape[1] // k.shape[1], 1)[:, None]
    return masked_attention(grouped, k, v, mask).reshape(q.shape)


def _fit(kept: torch.Tensor, slots: int) -> torch.Tensor:
    """Return (B, H_kv, S, D) with other slots: zeros added, or what is beyond cut off."""
    return F.pad(kept, (0, 0, 0, slots - kept.shape[2]))


def key_value_heads(config: Any) -> int:
    """Return how many heads of keys and values a configuration has: all, unless it says fewer."""
    return getattr(config, "num_key_value_heads", config.num_heads)
