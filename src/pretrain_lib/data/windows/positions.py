"""Positions of windows in a run, as callers give them."""

from collections.abc import Sequence
from numbers import Integral

import numpy as np

from pretrain_lib.values import show


def check_positions(positions: Sequence[int]) -> np.ndarray:
    """Return the positions of windows in the run as int64, or say why they are none."""
    if not all(isinstance(position, Integral) for position in positions):
        raise ValueError(f"windows {show(positions)} must be whole numbers")
    if min(positions, default=0) < 0:
        raise IndexError(f"window {min(positions)}: windows count from 0 at the run's start")
    return np.array(positions, dtype=np.int64)
