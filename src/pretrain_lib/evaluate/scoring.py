"""Log-likelihoods of endings given their contexts; a common prefix is computed once.

Shapes: B rows, T positions, D width, V vocabulary, S hidden states, N scored tokens.
"""

from collections.abc import Iterator, Sequence

import torch

from pretrain_lib.evaluate.prefix_trees import Request, Tree, batch_trees, grow_trees, lay_out
from pretrain_lib.models.interface import Model

Score = tuple[float, bool]

HEAD_BYTES = 2**27  # limit on the logits in memory
BLOCK_LOGITS = 2**20  # on a CPU, elementwise operations on this many logits stay in its cache


@torch.no_grad()
def score_endings(
    model: Model, requests: Sequence[Request], *, batch_size: int
) -> Iterator[tuple[int, Score]]:
    """Yield `(index, (log-likelihood in nats, is greedy))` for each `(context, ending)`.

    An ending is greedy if each of its tokens is the most likely one. If context and ending exceed
    the context length, the context is truncated on the left, as in lm-eval's `HFLM`. A batch holds
    about the tokens of `batch_size` contexts of mean size with all their endings. Raises ValueError
    for a request without a context, or an ending that is empty or too long.
    """
    head, trees = Head(model), grow_trees(requests, model.config)
    for batch in batch_trees(trees, batch_size, model.config):
        yield from _score_trees(model, head, batch, requests)


def _score_trees(
    model: Model, head: "Head", trees: Sequence[Tree], requests: Sequence[Request]
) -> Iterator[tuple[int, Score]]:
    ids, paths = lay_out(trees, model.config)
    hidden = model.hidden_states(ids.to(head.weight.device), cache=paths)  # (B, T, D)
    length = ids.shape[1]
    endings = [
        (number, [row * length + place for place in places])
        for row, tree in enumerate(trees)
        for number, places in tree.endings
    ]
    places = torch.tensor([place for _, ending in endings for place in ending])  # (N,)
    targets = torch.tensor([token for number, _ in endings for token in requests[number][1]])
    # Endings with a common prefix share hidden states.
    chosen, owners = places.unique(return_inverse=True)
    states = hidden.flatten(0, 1)[chosen.to(hidden.device)]  # (S, D)
    nats, hits = head.score(states, owners.to(hidden.device), targets.to(hidden.device))
    lengths = [len(ending) for _, ending in endings]
    parts = zip(endings, nats.split(lengths), hits.split(lengths), strict=True)
    for (number, _), own_nats, own_hits in parts:
        yield number, (float(own_nats.sum()), bool(own_hits.all()))


class Head:
    """The output head of a model; scores tokens in chunks to bound the memory of the logits."""

    def __init__(self, model: Model) -> None:
        self.model = model
        weight = model.head_weight
        device = weight.device.type
        if torch.is_autocast_enabled(device):
            weight = weight.to(torch.get_autocast_dtype(device))
        self.weight = weight  # (V_padded, D)
        self.vocabulary_size = model.config.vocabulary_size
        # Reuse one buffer: allocating one per chunk would cost as much as the arithmetic.
        rows = max(1, HEAD_BYTES // (len(weight) * weight.element_size()))
        self.buffer = weight.new_empty(rows, len(weight))

    def score(
        self, states: torch.Tensor, owners: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-likelihood of each target in nats, and whether it is the argmax.

        `owners` `(N,)` are the indices of the hidden states `(S, D)` that predict `targets` `(N,)`.
        Both results are `(N,)` and on the CPU, the first in fp64.
        """
        normalizers, likeliest, logits = [], [], targets.new_zeros(len(targets), dtype=torch.float)
        first = 0
        chunks = -(-len(states) // len(self.buffer))
        for part in states.to(self.weight.dtype).chunk(chunks):
            projected = self._project(part)
            local = ((owners >= first) & (owners < first + len(part))).nonzero()[:, 0]
            logits[local] = projected[owners[local] - first, targets[local]].float()
            for block in projected.split(self._block_rows()):
                normalizer, best = _reduce(block)
                normalizers.append(normalizer)
                likeliest.append(best)
            first += len(part)
        nats = (logits - torch.cat(normalizers)[owners]).cpu().double()
        return nats, (torch.cat(likeliest)[owners] == targets).cpu()

    def _project(self, states: torch.Tensor) -> torch.Tensor:
        """Return the logits (S, V) of hidden states (S, D); the next call may overwrite them."""
        if not self.model.has_plain_head:
            return self.model.logits(states[None])[0]
        product = torch.mm(states, self.weight.T, out=self.buffer[: len(states)])
        return product[:, : self.vocabulary_size]

    def _block_rows(self) -> int:
        if self.weight.device.type != "cpu":
            return len(self.buffer)
        return max(1, BLOCK_LOGITS // self.vocabulary_size)


def _reduce(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-sum-exp, in fp32, and the argmax of each row of logits `(S, V)`."""
    logits = logits.float()
    likeliest = logits.argmax(dim=1, keepdim=True)
    top = logits.gather(1, likeliest)
    normalizer = top - logits.log_softmax(dim=1).gather(1, likeliest)
    return normalizer[:, 0], likeliest[:, 0]
