"""Create the Accelerator of a run."""

import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs

from pretrain_lib.config.settings import Recipe
from pretrain_lib.distributed.float8 import float8_recipe
from pretrain_lib.distributed.guards import check_accumulation, check_trackers, check_world
from pretrain_lib.distributed.launch_file import names_precision
from pretrain_lib.distributed.launched import is_elastic, limit_waits, meet_main_rank
from pretrain_lib.distributed.sharding import build_sharding, check_sharding, is_set


def start_accelerator(config: Recipe) -> Accelerator:
    """Create the Accelerator of a run: device, processes, precision, sharding, trackers.

    Processes, precision and sharding are those of `accelerate launch`. Where nobody asked for a
    precision, a run uses bf16 if the device is fast in it. Started by plain `python`, it has one
    process. Raises ValueError if the actual setup differs from the requested one.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1))
    check_trackers(config.log.trackers)
    # Otherwise two processes on a machine without CUDA would each be a run of one process.
    cpu = launched > 1 and not torch.cuda.is_available()
    wanted = os.environ.get("ACCELERATE_MIXED_PRECISION", "bf16") if names_precision() else "bf16"
    precision, remark = choose_precision(wanted, cpu)
    recipes = [float8_recipe(config, cpu=_uses_cpu(cpu))] if precision == "fp8" else []
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=precision,
        fsdp_plugin=build_sharding(param_dtype=config.system.fsdp_param_dtype),
        # `train_step` handles gradient accumulation itself: ignore the setting of the environment.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=1, sync_with_dataloader=False
        ),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(seconds=config.system.collective_timeout)),
            # A forward uses each weight once, so caching bf16 copies would only take memory.
            AutocastKwargs(cache_enabled=False),
            *recipes,
        ],
        log_with=list(config.log.trackers) or None,
        project_dir=config.run.dir,
    )
    if remark:
        accelerator.print(remark)
    check_world(accelerator, launched=launched, expected=config.system.processes)
    check_sharding(accelerator, param_dtype=config.system.fsdp_param_dtype)
    check_accumulation(config, processes=accelerator.num_processes)
    limit_waits(config.system.collective_timeout)
    if is_elastic():
        meet_main_rank(accelerator)
    if accelerator.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    return accelerator


def choose_precision(wanted: str, cpu: bool) -> tuple[str, str | None]:
    """Return "fp8", "bf16" or "no" (fp32), and a remark if it is not what was meant, or slow."""
    if wanted not in ("no", "bf16", "fp8"):
        raise ValueError(
            f"mixed_precision={wanted} is not supported: set 'no', 'bf16' or 'fp8' in the "
            f"configuration of accelerate launch (fp16 would need loss scaling)"
        )
    if wanted == "fp8":
        slow = "a CPU has no float8: it is emulated, to try it out; training in bf16 is faster"
        return "fp8", slow if _uses_cpu(cpu) else None
    device, fast = _speed_in_bf16(cpu)
    if wanted == "no":
        remark = "training in fp32, as accelerate's configuration asks for (mixed_precision: no)"
        return "no", f"{remark}; {device} is faster in bf16" if fast else None
    return ("bf16", None) if fast else ("no", f"{device} is not fast in bf16: training in fp32")


def _uses_cpu(cpu: bool) -> bool:
    """Return whether a run will use the CPU: `cpu`, or the launcher's flag, or what there is."""
    has_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    return cpu or is_set("ACCELERATE_USE_CPU") or not has_gpu


def _speed_in_bf16(cpu: bool) -> tuple[str, bool]:
    """Return the device that a run will use, in words, and whether it is fast in bf16."""
    if not _uses_cpu(cpu):
        if torch.cuda.is_available():
            return "this GPU", torch.cuda.is_bf16_supported(including_emulation=False)
        return "MPS", False
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "this CPU", fast
