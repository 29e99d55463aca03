"""Contexts with their endings, those that begin alike in one tree of tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from pretrain_lib.models.cache import TokenTrees, key_value_heads

Request = tuple[Sequence[int], Sequence[int]]  # context and ending

OPEN = 2**31 - 1  # the end of a token that the tree still grows below
MASK_ENTRIES = 2**27  # of a batch at most: four bytes each in fp32


@dataclass
class Tree:
    """Tokens in depth-first order, as `TokenTrees` reads them, and what they are to predict."""

    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    endings: list[tuple[int, list[int]]] = field(default_factory=list)
    """Of each request its number, and the places that predict the tokens of its ending."""
    path: list[int] = field(default_factory=list)
    """The places of the sequence that was added last."""

    def add(self, tokens: Sequence[int], *, shared: int) -> None:
        """Add a sequence that has its first `shared` tokens in common with the last."""
        first, new = len(self.tokens), len(tokens) - shared
        for place in self.path[shared:]:
            self.ends[place] = first
        self.path = self.path[:shared] + [*range(first, first + new)]
        self.tokens += tokens[shared:]
        self.depths += range(shared, len(tokens))
        self.ends += [OPEN] * new


def grow_trees(requests: Sequence[Request], config: Any) -> list[Tree]:
    """Return trees that hold all requests of a model of this configuration, the largest first.

    The last token of an ending is predicted and never read. A context that is too long with its
    ending loses its beginning, as in lm-eval's own model. Raises ValueError for a request that
    cannot be scored.
    """
    sequences = sorted(
        (_sequence(number, *request, config.context_length), number)
        for number, request in enumerate(requests)
    )
    trees: list[Tree] = []
    last: list[int] = []
    for tokens, number in sequences:
        shared = _count_shared(last, tokens)
        if not trees or not _pays(trees[-1], shared, len(tokens) - shared, config):
            trees.append(Tree())
            shared = 0
        trees[-1].add(tokens, shared=shared)
        trees[-1].endings.append((number, trees[-1].path[-len(requests[number][1]) :]))
        last = tokens
    return sorted(trees, key=lambda tree: -len(tree.tokens))


def _pays(tree: Tree, shared: int, new: int, config: Any) -> bool:
    """Return whether a sequence belongs in a tree, with so many tokens shared and so many new.

    All tokens of a row are compared with each other, and the matrix products of one take as long as
    its attention to about `width` others. A row holds at most twice the context.
    """
    size = len(tree.tokens)
    fits = size + new <= 2 * config.context_length and _rows_of(size + new, config) >= 1
    return fits and shared * (config.width + shared + 2 * new) >= 2 * size * new


def _rows_of(length: int, config: Any) -> int:
    """Return how many rows of a length have room for their mask."""
    groups = config.num_heads // key_value_heads(config)
    return MASK_ENTRIES // (length**2 * groups)


def _sequence(
    number: int, context: Sequence[int], ending: Sequence[int], context_length: int
) -> list[int]:
    """Return the tokens that are read for a request."""
    if not context or not 0 < len(ending) <= context_length:
        raise ValueError(
            f"request {number} has {len(context)} tokens of context, which must be 1 or more, "
            f"and {len(ending)} to score, which must be 1 to {context_length} "
            f"(model.context_length)"
        )
    return [*context, *ending[:-1]][-context_length:]


def _count_shared(a: list[int], b: list[int]) -> int:
    """Return how many tokens two sequences begin with alike, by halving."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def batch_trees(trees: Sequence[Tree], batch_size: int, config: Any) -> Iterator[list[Tree]]:
    """Yield trees in order: at once as many tokens, pads included, as `batch_size` of the mean.

    But no more than that many rows as long as the context.
    """
    mean = sum(len(tree.tokens) for tree in trees) / max(1, len(trees))
    budget = batch_size * min(mean, config.context_length)
    first = 0
    while first < len(trees):
        longest = len(trees[first].tokens)
        rows = max(1, min(int(budget // longest), _rows_of(longest, config)))
        yield [*trees[first : first + rows]]
        first += rows


def lay_out(trees: Sequence[Tree], config: Any) -> tuple[torch.Tensor, TokenTrees | None]:
    """Return int64 (B, T), pads on the right, where nothing sees them, and how it is attended to.

    None where no row has branches: then it is as any text.
    """
    tokens = _pad([tree.tokens for tree in trees])
    if all(tree.depths[-1] + 1 == len(tree.depths) for tree in trees):
        return tokens, None
    # Pads stand at position 0, and see something, or their softmax would have no number.
    ends = _pad([tree.ends for tree in trees], value=OPEN)
    return tokens, TokenTrees(config, depths=_pad([tree.depths for tree in trees]), ends=ends)


def _pad(rows: Sequence[Sequence[int]], value: int = 0) -> torch.Tensor:
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value)
