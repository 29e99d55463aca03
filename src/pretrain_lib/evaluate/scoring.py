"""Log-likelihoods of endings, each context read once for all of its endings. Floor 5.

Shapes: B rows, T positions, D width, V vocabulary, N scored tokens.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from pretrain_lib.models.cache import KeyValueCache
from pretrain_lib.models.hf import Model

Ids = tuple[int, ...]
Ending = tuple[int, Ids]  # the number of its request, and its tokens
Score = tuple[float, bool]
Request = tuple[Sequence[int], Sequence[int]]  # context and ending
Scorer = Callable[[Sequence[Request]], Iterator[tuple[int, Score]]]

SHORTEST_SHARED = 8  # tokens: of a shorter context, reading it once saves less than it costs
POOLED = 8  # batches of contexts at most whose endings are sorted together: less is padding
HEAD_TOKENS = 512  # whose logits exist at once


@torch.no_grad()
def score_endings(
    model: Model, requests: Sequence[Request], *, batch_size: int
) -> Iterator[tuple[int, Score]]:
    """Yield `(number, (log-likelihood in nats, is greedy))` of each `(context, ending)`.

    Greedy is an ending whose tokens are the likeliest throughout. A context that is too long for
    the model with its ending loses its beginning, as in lm-eval's own model. `batch_size` contexts
    are read at once, the longest first. Raises ValueError for what cannot be scored.
    """
    groups = _group(requests, model.config.context_length)
    shared = [group for group in groups if len(group[1]) > 1 and len(group[0]) >= SHORTEST_SHARED]
    alone = [
        (context, ending)
        for context, endings in groups
        if len(endings) == 1 or len(context) < SHORTEST_SHARED
        for ending in endings
    ]
    shared.sort(key=lambda group: -len(group[0]))
    while shared:
        # No more keys and values at once than those of `batch_size` rows as long as can be.
        fitting = min(POOLED, model.config.context_length // len(shared[0][0])) * batch_size
        pool, shared = shared[:fitting], shared[fitting:]
        yield from _score_groups(model, pool, batch_size)
    for batch in _batches(sorted(alone, key=lambda row: -len(row[0] + row[1][1])), batch_size):
        yield from _score_rows(model, batch)


def _group(requests: Sequence[Request], context_length: int) -> list[tuple[Ids, list[Ending]]]:
    """Return contexts, cut to what the model can see, each with the endings that share it."""
    groups: dict[Ids, list[Ending]] = {}
    for number, (context, ending) in enumerate(requests):
        if not context or not 0 < len(ending) <= context_length:
            raise ValueError(
                f"request {number} has {len(context)} tokens of context, which must be 1 or more, "
                f"and {len(ending)} to score, which must be 1 to {context_length} "
                f"(model.context_length)"
            )
        # The ending's last token is scored and never read.
        kept = tuple(context[-(context_length + 1 - len(ending)) :])
        groups.setdefault(kept, []).append((number, tuple(ending)))
    return [*groups.items()]


def _score_rows(model: Model, batch: list[tuple[Ids, Ending]]) -> Iterator[tuple[int, Score]]:
    """Score contexts with one ending each, a row for both."""
    rows = [context + ending[:-1] for context, (_, ending) in batch]
    hidden = model.hidden_states(_pad(rows, model))
    states = [
        own[len(context) - 1 :][: len(ending)]
        for own, (context, (_, ending)) in zip(hidden, batch, strict=True)
    ]
    return _score_states(model, torch.cat(states), [ending for _, ending in batch])


def _score_groups(
    model: Model, pool: list[tuple[Ids, list[Ending]]], batch_size: int
) -> Iterator[tuple[int, Score]]:
    """Read contexts, then score their endings, so many at once as take no more tokens."""
    read = [_read(model, [ids for ids, _ in batch]) for batch in _batches(pool, batch_size)]
    cache = KeyValueCache.join([cache for cache, _ in read])
    last = torch.cat([states for _, states in read])
    rows = [(row, ending) for row, (_, endings) in enumerate(pool) for ending in endings]
    rows.sort(key=lambda row: -len(row[1][1]))
    while rows:
        fitting = batch_size * max(1, len(pool[0][0]) // len(rows[0][1][1]))
        some, rows = rows[:fitting], rows[fitting:]
        yield from _score_endings_of(model, cache, last, some)


def _read(model: Model, contexts: list[Ids]) -> tuple[KeyValueCache, torch.Tensor]:
    """Return a cache of contexts, and the hidden states (B, D) that predict what follows them."""
    counts = torch.tensor([len(context) for context in contexts])
    cache = KeyValueCache(model.config, rows=len(contexts), slots=int(counts.max()))
    hidden = model.hidden_states(_pad(contexts, model), cache=cache)
    cache.advance(counts)
    return cache, hidden[torch.arange(len(contexts)), counts - 1]


def _score_endings_of(
    model: Model, cache: KeyValueCache, last: torch.Tensor, rows: list[tuple[int, Ending]]
) -> Iterator[tuple[int, Score]]:
    """Score endings, each after the cached context of the row that stands before it."""
    chosen = torch.tensor([row for row, _ in rows])
    endings = [ending for _, ending in rows]
    states = last[chosen][:, None]  # (B, 1, D)
    new = max(len(ids) for _, ids in endings) - 1
    if new:
        slots = int(cache.lengths[chosen].max()) + new
        hidden = model.hidden_states(
            _pad([ids[:-1] for _, ids in endings], model),
            cache=cache.expand(chosen, slots=slots),
        )
        states = torch.cat([states, hidden], dim=1)
    real = [states[row, : len(ids)] for row, (_, ids) in enumerate(endings)]
    return _score_states(model, torch.cat(real), endings)


def _score_states(
    model: Model, states: torch.Tensor, endings: list[Ending]
) -> Iterator[tuple[int, Score]]:
    """Score the tokens of endings by the hidden states (N, D) that predict them, in order."""
    targets = torch.tensor([token for _, ids in endings for token in ids], device=states.device)
    scores, greedy = [], []
    for some, wanted in zip(states.split(HEAD_TOKENS), targets.split(HEAD_TOKENS), strict=True):
        logits = F.linear(some, model.head_weight)[:, : model.config.vocabulary_size].float()
        scores.append(-F.cross_entropy(logits, wanted, reduction="none"))
        greedy.append(logits.argmax(dim=1) == wanted)
    lengths = [len(ids) for _, ids in endings]
    parts = zip(
        endings,
        torch.cat(scores).cpu().double().split(lengths),
        torch.cat(greedy).cpu().split(lengths),
        strict=True,
    )
    for (number, _), nats, hits in parts:
        yield number, (float(nats.sum()), bool(hits.all()))


def _pad(rows: list[Ids], model: Model) -> torch.Tensor:
    """Return rows as int64 (B, T), pads on the right, where no real token sees them."""
    padded = pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True)
    return padded.to(model.head_weight.device)


def _batches(items: list, size: int) -> Iterator[list]:
    return (items[first : first + size] for first in range(0, len(items), size))
