"""FSDP2 on CPUs, for tests: Accelerate runs DDP there instead, so its state is set by hand.

As a script: python tests/fsdp_on_cpu.py SCRIPT FLAGS... runs SCRIPT so. SHARD_SIZE makes it HSDP:
copies of the model, each cut into so many pieces.
"""

import os
import runpy
import sys
from pathlib import Path

from accelerate import Accelerator, DistributedType, PartialState
from accelerate.parallelism_config import ParallelismConfig

import pretrain_lib.distributed.engine


def sharding_accelerator(*, fsdp_plugin, **options):
    """Return an Accelerator that shards on CPUs as it would on GPUs."""
    accelerator = Accelerator(fsdp_plugin=fsdp_plugin, **options)
    state = accelerator.state
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = fsdp_plugin
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    shards = int(os.environ.get("SHARD_SIZE", accelerator.num_processes))
    copies = accelerator.num_processes // shards
    if copies > 1:
        parallel = ParallelismConfig(dp_replicate_size=copies, dp_shard_size=shards)
        state.parallelism_config = parallel
        state.device_mesh = parallel.build_device_mesh("cpu")
    return accelerator


def shard_on_cpus():
    """Have every Accelerator that the library starts from now on shard."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    pretrain_lib.distributed.engine.Accelerator = sharding_accelerator


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    shard_on_cpus()
    runpy.run_path(sys.argv[0], run_name="__main__")
