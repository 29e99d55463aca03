"""Log-likelihoods of endings, all that begins alike read once.

Shapes: B rows, T positions, D width, V vocabulary, S states, N scored tokens.
"""

from collections.abc import Iterator, Sequence

import torch

from pretrain_lib.evaluate.prefix_trees import Request, Tree, batch_trees, grow_trees, lay_out
from pretrain_lib.models.hf import Model

Score = tuple[float, bool]

HEAD_BYTES = 2**27  # of logits that exist at once
BLOCK_LOGITS = 2**20  # on a CPU what is done to them one by one stays in its cache


@torch.no_grad()
def score_endings(
    model: Model, requests: Sequence[Request], *, batch_size: int
) -> Iterator[tuple[int, Score]]:
    """Yield `(number, (log-likelihood in nats, is greedy))` of each `(context, ending)`.

    Greedy is an ending whose tokens are the likeliest throughout. A context that is too long for
    the model with its ending loses its beginning, as in lm-eval's own model. `batch_size` contexts
    of the mean size, with all their endings, are read at once. Raises ValueError for what cannot be
    scored.
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
    places = torch.tensor([place for _, own in endings for place in own])  # (N,)
    targets = torch.tensor([token for number, _ in endings for token in requests[number][1]])
    # Endings that part later have states in common.
    chosen, owners = places.unique(return_inverse=True)
    states = hidden.flatten(0, 1)[chosen.to(hidden.device)]  # (S, D)
    nats, hits = head.score(states, owners.to(hidden.device), targets.to(hidden.device))
    lengths = [len(own) for _, own in endings]
    parts = zip(endings, nats.split(lengths), hits.split(lengths), strict=True)
    for (number, _), own_nats, own_hits in parts:
        yield number, (float(own_nats.sum()), bool(own_hits.all()))


class Head:
    """A model's head, which scores tokens without the logits of all existing at once."""

    def __init__(self, model: Model) -> None:
        weight = model.head_weight
        device = weight.device.type
        if torch.is_autocast_enabled(device):
            weight = weight.to(torch.get_autocast_dtype(device))
        self.weight = weight  # (V_padded, D)
        self.vocabulary_size = model.config.vocabulary_size
        # One buffer for all: fresh pages for each would cost as much as the arithmetic.
        rows = max(1, HEAD_BYTES // (len(weight) * weight.element_size()))
        self.buffer = weight.new_empty(rows, len(weight))

    def score(
        self, states: torch.Tensor, owners: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-likelihood (N,) of each token in nats, and whether it is the likeliest.

        `states` (S, D); `owners` (N,) say which of them is to predict which of `targets` (N,).
        Both results are on the CPU, the first in fp64.
        """
        normalizers, likeliest, logits = [], [], targets.new_zeros(len(targets), dtype=torch.float)
        first = 0
        chunks = -(-len(states) // len(self.buffer))
        for some in states.to(self.weight.dtype).chunk(chunks):
            found = torch.mm(some, self.weight.T, out=self.buffer[: len(some)])
            found = found[:, : self.vocabulary_size]
            own = ((owners >= first) & (owners < first + len(some))).nonzero()[:, 0]
            logits[own] = found[owners[own] - first, targets[own]].float()
            for block in found.split(self._block_rows()):
                normalizer, best = _reduce(block)
                normalizers.append(normalizer)
                likeliest.append(best)
            first += len(some)
        nats = (logits - torch.cat(normalizers)[owners]).cpu().double()
        return nats, (torch.cat(likeliest)[owners] == targets).cpu()

    def _block_rows(self) -> int:
        if self.weight.device.type != "cpu":
            return len(self.buffer)
        return max(1, BLOCK_LOGITS // self.vocabulary_size)


def _reduce(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-sum-exp in fp32 and the likeliest token of each row of logits (S, V)."""
    logits = logits.float()
    likeliest = logits.argmax(dim=1, keepdim=True)
    top = logits.gather(1, likeliest)
    normalizer = top - logits.log_softmax(dim=1).gather(1, likeliest)
    return normalizer[:, 0], likeliest[:, 0]
