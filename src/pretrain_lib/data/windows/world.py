"""The place of a process among those that share the windows of a step."""

from torch import distributed

from pretrain_lib.values import check_value


def find_place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return rank and world size: those given, or of the process group, or of one process alone.

    Raises ValueError for a rank that is not below the world size.
    """
    grouped = distributed.is_available() and distributed.is_initialized()
    defaults = (distributed.get_rank(), distributed.get_world_size()) if grouped else (0, 1)
    rank = defaults[0] if rank is None else rank
    world_size = defaults[1] if world_size is None else world_size
    check_value(world_size, "world_size", int, minimum=1)
    check_value(rank, "rank", int, minimum=0)
    if rank >= world_size:
        raise ValueError(
            f"rank={rank} must be below world_size={world_size}: give both, or neither to take "
            f"those of torch.distributed"
        )
    return rank, world_size
