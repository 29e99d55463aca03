"""The rank of this process, from the environment variables that every launcher sets."""

import os


def is_main_rank() -> bool:
    """Return whether this process has rank 0, or is the only one."""
    return int(os.environ.get("RANK", 0)) == 0


def is_local_main_rank() -> bool:
    """Return whether this process has local rank 0: the first on its machine, or the only one."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0
