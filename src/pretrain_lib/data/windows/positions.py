"""What callers give to find windows in a run: their positions, and the seed of the order."""

from collections.abc import Sequence
from numbers import Integral

import numpy as np

from pretrain_lib.values import show

LARGEST_SEED = 2**63 - 1  # of the order of windows


def check_positions(positions: Sequence[int]) -> np.ndarray:
    """Return the positions of windows in the run as int64, or say why they are none."""
    if not all(isinstance(position, Integral) for position in positions):
        raise ValueError(f"windows {show(positions)} must be whole numbers")
    if min(positions, default=0) < 0:
        raise IndexError(f"window {min(positions)}: windows count from 0 at the run's start")
    return np.array(positions, dtype=np.int64)
