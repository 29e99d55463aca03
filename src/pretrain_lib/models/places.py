"""Positions of tokens, in documents and behind cached tokens, and their limit, the context.

Shapes: B sequences, T positions, E ends, N documents.
"""

from typing import TYPE_CHECKING, Any

import torch

from pretrain_lib.models.attention import document_positions
from pretrain_lib.models.document_attention import document_boundaries

if TYPE_CHECKING:
    from pretrain_lib.models.cache import CachedLayer, KeyValueCache, TokenTrees


def place_tokens(
    input_ids: torch.Tensor,
    document_ends: torch.Tensor | None,
    cache: "KeyValueCache | TokenTrees | None",
    *,
    context_length: int,
) -> tuple[torch.Tensor, torch.Tensor | None, "list[CachedLayer] | list[TokenTrees] | None"]:
    """Return the positions (B or 1, T) of tokens, document boundaries (N + 1,), cached layers.

    The last two are None without `document_ends` and without a `cache`. Raises ValueError for a
    sequence that is longer than the context, and as `expand_document_ends` does.
    """
    rows, length = input_ids.shape
    if document_ends is not None:
        document_ends = expand_document_ends(document_ends, input_ids, cache)
    if cache is not None:
        positions, cached_layers = cache.begin(rows, length, input_ids.device)
        return positions, None, cached_layers
    if length > context_length:
        raise ValueError(
            f"a sequence of {length} tokens is longer than model.context_length={context_length}"
        )
    if document_ends is None:
        return torch.arange(length, device=input_ids.device)[None], None, None
    positions = document_positions(document_ends, length)
    return positions, document_boundaries(document_ends, length), None


def expand_document_ends(
    document_ends: torch.Tensor, input_ids: torch.Tensor, cache: Any
) -> torch.Tensor:
    """Return `document_ends` for every row, (B, E).

    Raises ValueError for another shape and beside a cache; on a CPU, where that is free, also for
    ends that do not ascend.
    """
    rows, length = input_ids.shape
    shape = tuple(document_ends.shape)
    if cache is not None:
        raise ValueError(
            "document_ends cannot be given with a cache, which holds one text per row: leave one "
            "of them out"
        )
    if len(shape) != 2 or shape[0] not in (1, rows):
        raise ValueError(
            f"document_ends of shape {shape} do not fit input_ids of shape {(rows, length)}: they "
            f"must be ({rows}, E), or (1, E) for the same ends in all rows"
        )
    if document_ends.device.type == "cpu" and not torch.compiler.is_compiling():
        starts = torch.nn.functional.pad(document_ends, (1, 0))[:, :-1]
        if bool((document_ends < starts).any()):
            raise ValueError(
                f"document_ends={document_ends.tolist()} must ascend in each row, from 0: each is "
                f"the index after the last token of a document"
            )
    return document_ends.expand(rows, -1)


def check_rows(expected: int, found: int) -> None:
    """Raise ValueError for a batch of another number of sequences than a cache has rows."""
    if expected != found:
        raise ValueError(
            f"the cache has rows={expected}, input_ids have {found} sequences: make one with as "
            f"many rows, or expand it"
        )
