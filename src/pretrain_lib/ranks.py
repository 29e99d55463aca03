"""Which process this is, by the environment that every launcher sets."""

import os


def is_main_rank() -> bool:
    """Return whether this is the first process of the launch, or the only one."""
    return int(os.environ.get("RANK", 0)) == 0


def is_local_main_rank() -> bool:
    """Return whether this is the first process of the launch on this machine."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0
