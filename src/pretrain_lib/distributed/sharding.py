"""FSDP2 as it is used here: its settings, its guards, and the weights whole again.

(Zhao et al. 2023.) Weights, gradients and moments are cut along their first dimension over the
processes; each block is gathered where it is used. Accelerate's own default would reduce gradients
in bf16, and leave autocast out.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import FullyShardedDataParallelPlugin, broadcast
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, StateDictType

BLOCK = "Block"  # the class of a layer, in each of our models
# What may not be set in `fsdp_config`, and why, by Accelerate's name for it.
REFUSED = {
    "CPU_RAM_EFFICIENT_LOADING": "it would untie tied weights, and models are made in pieces",
    "ACTIVATION_CHECKPOINTING": "give --system.activation_checkpointing full or selective instead",
    "OFFLOAD_PARAMS": "it is not supported",
}


def is_sharding_asked_for() -> bool:
    """Whether the launcher was told to shard."""
    return _is_set("ACCELERATE_USE_FSDP")


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")


def build_sharding(*, param_dtype: str) -> FullyShardedDataParallelPlugin | None:
    """Return how to shard, None if the launcher was not told to.

    Weights stay in fp32 where they are held, and are gathered in `param_dtype`. Raises ValueError
    for what is not supported.
    """
    if not is_sharding_asked_for():
        return None
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise ValueError(
            f"fsdp_version={version} is not supported: set fsdp_version: 2 in the configuration "
            f"given to accelerate launch, as in accelerate_configs/fsdp2_8gpu.yaml"
        )
    for setting, reason in REFUSED.items():
        if _is_set(f"FSDP_{setting}"):
            raise ValueError(
                f"fsdp_{setting.lower()}=true in the configuration given to accelerate launch: set "
                f"it to false ({reason})"
            )
    return FullyShardedDataParallelPlugin(
        mixed_precision_policy=MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if param_dtype == "bf16" else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # rotary angles stay in fp32; autocast does the rest
        ),
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[BLOCK],
    )


def check_sharding(accelerator: Accelerator, *, param_dtype: str) -> None:
    """Raise ValueError if the run would not shard as launcher and recipe were told to."""
    if is_sharding_asked_for() and not is_sharded(accelerator):
        raise ValueError(
            f"FSDP was asked for but Accelerate runs {accelerator.distributed_type.value} without "
            f"it: it takes several processes with a GPU each; on CPUs use "
            f"accelerate_configs/cpu_2proc.yaml"
        )
    if param_dtype == "bf16" and not (
        is_sharded(accelerator) and accelerator.mixed_precision == "bf16"
    ):
        raise ValueError(
            "system.fsdp_param_dtype=bf16 is for FSDP2 with mixed_precision: bf16, which this run "
            "is not: leave it at fp32, or launch with accelerate_configs/fsdp2_8gpu.yaml"
        )
    parallel = accelerator.parallelism_config
    if parallel is not None and parallel.non_data_parallel_size > 1:
        raise ValueError(
            f"parallelism_config asks for {parallel.non_data_parallel_size} processes with parts "
            f"of a sequence or of a matrix each, which is not supported: leave only "
            f"dp_replicate_size and dp_shard_size"
        )


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process holds a piece of the model only."""
    return accelerator.distributed_type == DistributedType.FSDP


def writes_by_one(accelerator: Accelerator) -> bool:
    """Whether a sharded run's checkpoints are written by one process (FULL_STATE_DICT)."""
    if not is_sharded(accelerator):
        return False
    return accelerator.state.fsdp_plugin.state_dict_type == StateDictType.FULL_STATE_DICT


def describe_sharding(accelerator: Accelerator) -> str:
    """Return how the processes share a model, in a few words."""
    if not is_sharded(accelerator):
        return "DDP" if accelerator.num_processes > 1 else "no sharding"
    parallel = accelerator.parallelism_config
    way = "FSDP2"
    if parallel is not None and parallel.dp_replicate_size > 1:
        way = f"HSDP ({parallel.dp_replicate_size} copies, each cut in {parallel.dp_shard_size})"
    low = accelerator.state.fsdp_plugin.mixed_precision_policy.param_dtype is torch.bfloat16
    return f"{way}, weights sent in bf16" if low else way


@torch.no_grad()
def share_weights(model: nn.Module, accelerator: Accelerator) -> None:
    """Give all processes the weights of the first, before they are cut."""
    for parameter in model.parameters():
        parameter.copy_(broadcast(parameter.to(accelerator.device)))


@contextmanager
def whole_weights(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Hold all weights of a sharded model on every process meanwhile.

    Forward then needs no other process, so that each may evaluate as much as it has. The weights
    must not change meanwhile. Nothing happens to a model that is not sharded.
    """
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    # FSDP2 sets itself up at the first forward, which must be the whole model's.
    if modules:
        _read_one_token(model, accelerator)
    try:
        yield
        # It notes which layer was read last, to gather ahead in the next backward by that: without
        # this, processes that evaluated different parts of the model would wait for each other.
        if modules:
            _read_one_token(model, accelerator)
    finally:
        for module in modules:
            # torch keeps the outermost, since backward begins with it.
            again = module is not model and accelerator.state.fsdp_plugin.reshard_after_forward
            module.set_reshard_after_forward(again, recurse=False)
            module.reshard()


def _read_one_token(model: nn.Module, accelerator: Accelerator) -> None:
    training = model.training
    model.eval()  # dropout would draw
    with torch.no_grad(), accelerator.autocast():
        model(torch.zeros(1, 1, dtype=torch.int64, device=accelerator.device))
    model.train(training)
