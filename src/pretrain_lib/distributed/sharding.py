"""Parameter sharding with FSDP2 (Zhao et al. 2023): settings, checks, gathering whole weights.

Weights, gradients and moments are sharded along their first dimension; each block is all-gathered
where it is used. Accelerate's default settings would reduce gradients in bf16 and not use autocast.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import FullyShardedDataParallelPlugin, broadcast
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, StateDictType

from pretrain_lib.models.modes import evaluation_mode

# Class name of a block in each of our models: what is sharded without a call of `shard_by_block`.
BLOCK = "Block"
# Settings of `fsdp_config` that are rejected, by Accelerate's names, and the reasons.
REFUSED = {
    "CPU_RAM_EFFICIENT_LOADING": "it would untie tied weights, and models are created sharded",
    "ACTIVATION_CHECKPOINTING": "set --system.activation_checkpointing instead",
    "OFFLOAD_PARAMS": "offloading to the CPU is not implemented",
}


def is_sharding_asked_for() -> bool:
    """Return whether the launcher was configured for FSDP."""
    return is_set("ACCELERATE_USE_FSDP")


def is_set(variable: str) -> bool:
    """Return whether a flag of Accelerate's is on in the environment."""
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")


def build_sharding(*, param_dtype: str) -> FullyShardedDataParallelPlugin | None:
    """Return the FSDP2 settings, or None if the launcher was not configured for FSDP.

    `param_dtype` is the dtype in which weights are all-gathered, "fp32" or "bf16"; the shards stay
    in fp32. Raises ValueError for unsupported FSDP settings.
    """
    if not is_sharding_asked_for():
        return None
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise ValueError(
            f"fsdp_version={version} is not supported: set fsdp_version: 2 in the configuration "
            f"of accelerate launch, as in accelerate_configs/fsdp2_8gpu.yaml"
        )
    for setting, reason in REFUSED.items():
        if is_set(f"FSDP_{setting}"):
            raise ValueError(
                f"fsdp_{setting.lower()}=true in the configuration of accelerate launch is "
                f"not supported: set it to false ({reason})"
            )
    return FullyShardedDataParallelPlugin(
        mixed_precision_policy=MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if param_dtype == "bf16" else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # keeps rotary angles in fp32; autocast casts the rest
        ),
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[BLOCK],
    )


def check_sharding(accelerator: Accelerator, *, param_dtype: str) -> None:
    """Raise ValueError if the actual sharding is not that of launcher and recipe."""
    if is_sharding_asked_for() and not is_sharded(accelerator):
        raise ValueError(
            f"FSDP was requested but Accelerate runs {accelerator.distributed_type.value} without "
            f"it: FSDP needs several processes with a GPU each; on CPUs use "
            f"accelerate_configs/cpu_2proc.yaml"
        )
    if param_dtype == "bf16" and not (
        is_sharded(accelerator) and accelerator.mixed_precision != "no"
    ):
        raise ValueError(
            "system.fsdp_param_dtype=bf16 needs FSDP2 with mixed_precision: bf16, which this run "
            "does not use: leave it at fp32, or launch with accelerate_configs/fsdp2_8gpu.yaml"
        )
    parallel = accelerator.parallelism_config
    if parallel is not None and parallel.non_data_parallel_size > 1:
        raise ValueError(
            f"parallelism_config sets a non-data-parallel size of "
            f"{parallel.non_data_parallel_size}, but tensor, context and sequence parallelism are "
            f"not supported: set only dp_replicate_size and dp_shard_size"
        )


def is_sharded(accelerator: Accelerator) -> bool:
    """Return whether the model is sharded, so that each process holds only a part of it."""
    return accelerator.distributed_type == DistributedType.FSDP


def writes_by_one(accelerator: Accelerator) -> bool:
    """Return whether one process writes the checkpoints of a sharded run (FULL_STATE_DICT)."""
    if not is_sharded(accelerator):
        return False
    return accelerator.state.fsdp_plugin.state_dict_type == StateDictType.FULL_STATE_DICT


def shard_group(accelerator: Accelerator) -> int:
    """Return over how many processes one copy of the model is sharded, 1 if it is not."""
    if not is_sharded(accelerator):
        return 1
    parallel = accelerator.parallelism_config
    replicas = 1 if parallel is None else parallel.dp_replicate_size
    return accelerator.num_processes // replicas


def describe_sharding(accelerator: Accelerator) -> str:
    """Return a short description of the sharding."""
    if not is_sharded(accelerator):
        return "DDP" if accelerator.num_processes > 1 else "no sharding"
    parallel = accelerator.parallelism_config
    way = "FSDP2"
    if parallel is not None and parallel.dp_replicate_size > 1:
        way = f"HSDP ({parallel.dp_replicate_size} replicas of {parallel.dp_shard_size} shards)"
    low = accelerator.state.fsdp_plugin.mixed_precision_policy.param_dtype is torch.bfloat16
    return f"{way}, weights gathered in bf16" if low else way


def shard_by_block(model: nn.Module, accelerator: Accelerator) -> None:
    """Have each block of a model sharded and gathered by itself, whatever its class is called."""
    names = sorted({type(block).__name__ for block in model.blocks})
    accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = names


@torch.no_grad()
def share_weights(model: nn.Module, accelerator: Accelerator) -> None:
    """Broadcast the weights of the first process to all, before they are sharded."""
    for parameter in model.parameters():
        parameter.copy_(broadcast(parameter.to(accelerator.device)))


@contextmanager
def whole_weights(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Keep the whole weights of a sharded model on every process while the context is open.

    A forward then needs no communication, so each process may run a different number of them. The
    weights must not change in the meantime. Does nothing to a model that is not sharded.
    """
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    # FSDP2 initializes lazily at the first forward, which must be that of the root module.
    if modules:
        _read_one_token(model, accelerator)
    try:
        yield
        # FSDP2 prefetches in the next backward by the order of the last forward. End with the same
        # forward everywhere, or processes that ran different modules would wait for each other.
        if modules:
            _read_one_token(model, accelerator)
    finally:
        for module in modules:
            # torch never reshards the root module after forward, since backward begins with it.
            again = module is not model and accelerator.state.fsdp_plugin.reshard_after_forward
            module.set_reshard_after_forward(again, recurse=False)
            module.reshard()


def _read_one_token(model: nn.Module, accelerator: Accelerator) -> None:
    # In training mode, dropout would advance the random state.
    with torch.no_grad(), evaluation_mode(model), accelerator.autocast():
        model(torch.zeros(1, 1, dtype=torch.int64, device=accelerator.device))
