"""Prefix trees of requests: contexts and endings with a common prefix share its tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from pretrain_lib.models.any_model import attends_in_trees
from pretrain_lib.models.cache import TokenTrees, key_value_heads

Request = tuple[Sequence[int], Sequence[int]]  # context and ending

OPEN = 2**31 - 1  # the end of a token whose subtree is not complete
MASK_ENTRIES = 2**27  # limit on the attention mask of a batch; an entry is four bytes in fp32


@dataclass
class Tree:
    """A prefix tree: tokens in depth-first order, as `TokenTrees` reads them, and endings."""

    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    endings: list[tuple[int, list[int]]] = field(default_factory=list)
    """Per request: its index, and the positions that predict the tokens of its ending."""
    path: list[int] = field(default_factory=list)
    """The positions of the sequence that was added last."""

    def add(self, tokens: Sequence[int], *, shared: int) -> None:
        """Add a sequence that shares its first `shared` tokens with the last one added."""
        first, new = len(self.tokens), len(tokens) - shared
        for place in self.path[shared:]:
            self.ends[place] = first
        self.path = self.path[:shared] + [*range(first, first + new)]
        self.tokens += tokens[shared:]
        self.depths += range(shared, len(tokens))
        self.ends += [OPEN] * new


def grow_trees(requests: Sequence[Request], config: Any) -> list[Tree]:
    """Build the prefix trees of all requests for a model with this `config`, largest first.

    The last token of an ending is only predicted, so it is not in the tree. If context and ending
    exceed the context length, the context is truncated on the left, as in lm-eval's `HFLM`. Raises
    ValueError for a request without a context, or an ending that is empty or too long.
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
    """Return whether adding a sequence with `shared` and `new` tokens to a tree saves time.

    Attention compares all tokens of a row with each other; the matrix products of one token take as
    long as its attention to about `width` tokens. A row holds at most twice the context length.
    """
    size = len(tree.tokens)
    fits = size + new <= 2 * config.context_length and _rows_of(size + new, config) >= 1
    if not attends_in_trees(config):  # only what needs no branches
        return fits and (not new or shared == size)
    return fits and shared * (config.width + shared + 2 * new) >= 2 * size * new


def _rows_of(length: int, config: Any) -> int:
    """Return how many rows of a length fit within the limit on the attention mask."""
    groups = config.num_heads // key_value_heads(config)
    return MASK_ENTRIES // (length**2 * groups)


def _sequence(
    number: int, context: Sequence[int], ending: Sequence[int], context_length: int
) -> list[int]:
    """Return the input tokens of a request; raises ValueError if it cannot be scored."""
    if fault := find_fault(context, ending, context_length):
        raise ValueError(f"request {number} {fault}")
    return [*context, *ending[:-1]][-context_length:]


def find_fault(context: Sequence[int], ending: Sequence[int], context_length: int) -> str | None:
    """Return why an ending cannot be scored, as the end of a sentence; None if it can."""
    if context and 0 < len(ending) <= context_length:
        return None
    return (
        f"has {len(context)} tokens of context, which must be 1 or more, and {len(ending)} tokens "
        f"to score, which must be 1 to {context_length} (model.context_length)"
    )


def _count_shared(a: list[int], b: list[int]) -> int:
    """Return the length of the common prefix of two sequences, by bisection."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def batch_trees(trees: Sequence[Tree], batch_size: int, config: Any) -> Iterator[list[Tree]]:
    """Yield batches of trees, in order.

    A batch has at most the tokens of `batch_size` trees of mean size, counting padding, a mean
    above the context length counting as that length.
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
    """Return the tokens of a batch, int64 `(B, T)`, padded on the right, and its attention layout.

    No token attends to padding. The layout is None if no tree branches: causal attention will do.
    """
    tokens = _pad([tree.tokens for tree in trees])
    if all(tree.depths[-1] + 1 == len(tree.depths) for tree in trees):
        return tokens, None
    # Padding has depth 0 and must attend to something, or its softmax would be NaN.
    ends = _pad([tree.ends for tree in trees], value=OPEN)
    return tokens, TokenTrees(config, depths=_pad([tree.depths for tree in trees]), ends=ends)


def _pad(rows: Sequence[Sequence[int]], value: int = 0) -> torch.Tensor:
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value)
