"""What a run will cost, before it runs and without a GPU. Floor 5."""

import torch

from pretrain_lib.config import Recipe
from pretrain_lib.flops import PEAK_TFLOPS, count_parameters, model_flops
from pretrain_lib.metrics import human, human_time
from pretrain_lib.models.hf import build_model

MOMENTS_BYTES = {"fp32": 8, "bf16": 4}  # both of Adam's, for a parameter
EXAMPLES = (("A100", 1, 0.5), ("H100", 1, 0.5), ("H100", 8, 0.5))  # device, number, MFU


def format_plan(config: Recipe) -> str:
    """Return a text: steps, tokens, operations, memory, disk, and hours on some devices.

    Memory is that of weights, gradients and moments; activations come on top.
    """
    config.check(processes=config.run.processes or 1)
    with torch.device("meta"):
        model = build_model(config.model)
    length, schedule = config.batch.sequence_length, config.learning_rate()
    parameters = count_parameters(model)
    flops = model_flops(model, sequence_length=length)
    tokens = config.batch_sizes().before(schedule.total_steps) * length
    kept = config.run.keep_last or 1
    stored = parameters * (4 + MOMENTS_BYTES[config.optimizer.moments])  # weights and moments
    lines = [
        f"parameters        {parameters:,}",
        f"tokens per step   {config.batch.tokens:,}"
        + (f", from {config.batch.ramp_from:,}" if config.batch.ramp_from else ""),
        f"steps             {schedule.total_steps:,}, warm-up {schedule.warmup_steps:,}",
        f"tokens            {human(tokens)} ({tokens / parameters:.1f} per parameter)",
        f"FLOPs per token   {human(flops.total)} (6N + 12LdT), {human(flops.parameters)} (6N)",
        f"FLOPs             {flops.total * tokens:.3g}",
        f"memory per device {(stored + 4 * parameters) / 1e9:.2f} GB for weights and "
        f"gradients in fp32, Adam in {config.optimizer.moments}; activations come on top",
        f"disk              {kept} x {stored / 1e9:.2f} GB "
        f"of checkpoints (run.keep_last), one more while saving",
    ]
    for name, number, mfu in EXAMPLES:
        seconds = flops.total * tokens / (PEAK_TFLOPS[name] * 1e12 * number * mfu)
        lines.append(
            f"time              {human_time(seconds)} on {number} x {name} at {mfu:.0%} MFU"
        )
    return "\n".join(lines)
