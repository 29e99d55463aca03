"""The error bars of perplexities, which lm-eval finds by drawing items again and again."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np

# lm-eval's defaults. Fewer draws do not do: few items make the perplexity of a weak model.
DRAWS, SEEDED = 100_000, 1000  # in all, and from each generator
ITEMS = 2**22  # drawn at a time


@contextmanager
def drawn_by_numpy() -> Iterator[None]:
    """Let lm-eval take the error bars of perplexities from `perplexity_stderr`."""
    from lm_eval.api import metrics

    usual = metrics.bootstrap_stderr

    def bootstrap_stderr(f: Callable[[Sequence], float], xs: Sequence, iters: int) -> float:
        return perplexity_stderr(xs) if f is metrics.perplexity else usual(f, xs, iters)

    with patch.object(metrics, "bootstrap_stderr", bootstrap_stderr):
        yield


def perplexity_stderr(log_likelihoods: Sequence[float]) -> float:
    """Return the error bar that lm-eval gives the perplexity of items, in seconds, not minutes.

    It draws the same items: NumPy's generator goes on from the state of Python's.
    """
    values, means = np.asarray(log_likelihoods, dtype=np.float64), []
    rows = max(1, ITEMS // len(values))
    for seed in range(DRAWS // SEEDED):
        _, state, _ = random.Random(seed).getstate()
        generator = np.random.RandomState()
        generator.set_state(("MT19937", state[:-1], state[-1]))
        for first in range(0, SEEDED, rows):
            drawn = generator.random_sample((min(rows, SEEDED - first), len(values)))
            means.append(values[(drawn * len(values)).astype(np.int64)].mean(axis=1))
    return float(np.std(np.exp(-np.concatenate(means)), ddof=1))
