"""The cache of a model of transformers, for generation."""

import inspect
from typing import Any

import torch
from torch import nn

from pretrain_lib.models.places import check_rows

# How the families and the versions of transformers call their cache, newest name first.
NAMES = ("cache", "past_key_values", "cache_params")


class TransformersCache:
    """The cache that a model of transformers makes for itself, for rows of equal length.

    It is used as a `KeyValueCache` is, but all rows must have the same number of tokens, and so the
    same number of new ones: then no family needs to know about padding.
    """

    def __init__(self, *, rows: int, slots: int) -> None:
        self.slots = slots
        self.lengths = torch.zeros(rows, dtype=torch.int64)
        """Tokens in each row, (B,), all the same."""
        self._kept: Any = None  # whatever the family keeps

    def run(self, body: nn.Module, input_ids: torch.Tensor, **options: Any) -> Any:
        """Return the output of `body` for new tokens (B, T), and keep its cache."""
        check_rows(len(self.lengths), len(input_ids))
        name = cache_name(body)
        if name is None:
            raise AssertionError("the caller asks `cache_name` first")
        output = body(input_ids=input_ids, use_cache=True, **{name: self._kept}, **options)
        self._kept = getattr(output, name)
        return output

    def advance(self, new: torch.Tensor | int) -> None:
        """Add `new`, the number of tokens of the last forward, to the lengths."""
        self.lengths = self.lengths + new

    def expand(self, rows: torch.Tensor, *, slots: int) -> "TransformersCache":
        """Return an empty cache for some of the rows (N,), whose tokens are then read again.

        Every family selects rows of what it keeps in its own way.
        """
        return TransformersCache(rows=len(rows), slots=slots)


def cache_name(body: nn.Module) -> str | None:
    """Return the name of the argument by which a model of transformers takes its cache, if any."""
    taken = inspect.signature(type(body).forward).parameters
    return next((name for name in NAMES if name in taken), None)
