"""Perplexities that would overflow, and standard errors without 100,000 draws in Python."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np

from pretrain_lib.run_folder.metrics import perplexity

# lm-eval's defaults. Fewer draws do not do: few items make the perplexity of a weak model.
DRAWS, SEEDED = 100_000, 1000  # in all, and from each generator
ITEMS = 2**22  # drawn at a time


@contextmanager
def safe_perplexities() -> Iterator[None]:
    """Let lm-eval's perplexities overflow to infinity, with error bars of `perplexity_stderr`.

    Text with few spaces, such as Chinese, has hundreds of nats per word.
    """
    from lm_eval.api import metrics

    usual = metrics.bootstrap_stderr

    def bootstrap_stderr(f: Callable[[Sequence], float], xs: Sequence, iters: int) -> float:
        return perplexity_stderr(xs) if f is metrics.perplexity else usual(f, xs, iters)

    overflowing = SimpleNamespace(**vars(math) | {"exp": perplexity})
    with (
        patch.object(metrics, "bootstrap_stderr", bootstrap_stderr),
        patch.object(metrics, "math", overflowing),
    ):
        yield


def perplexity_stderr(log_likelihoods: Sequence[float]) -> float:
    """Return the error bar that lm-eval gives the perplexity of items, in seconds, not minutes.

    It draws the same items: NumPy's generator goes on from the state of Python's. It is not finite
    if a perplexity overflows.
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
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.std(np.exp(-np.concatenate(means)), ddof=1))
