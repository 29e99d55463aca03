"""The lines of a plan: the run, its checkpoints and activations, the table of devices."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

from pretrain_lib.config.settings import Recipe
from pretrain_lib.models.blocks import ActivationCheckpointing
from pretrain_lib.models.flops import MEMORY_GB, Hardware, count_parameters, model_flops
from pretrain_lib.models.interface import Model
from pretrain_lib.models.transformers_config import CausalLMConfig
from pretrain_lib.plan.disk import SAVING, most_checkpoints
from pretrain_lib.plan.memory import Memory, moment_bytes
from pretrain_lib.plan.muon import muon_cost
from pretrain_lib.plan.network import FP32, World
from pretrain_lib.plan.step import Step
from pretrain_lib.run_folder.metrics import human, human_time

BF16 = 2  # bytes
ESTIMATED = "                 estimated by a forward pass of shapes, without numbers, on the CPU"
CHECKPOINTING = get_args(ActivationCheckpointing)
COLUMNS = {
    "devices": 7,
    "sharding": 11,
    "batches": 7,
    "weights": 7,
    "grads": 7,
    "moments": 7,
    "buffers": 7,
    **dict.fromkeys(CHECKPOINTING, 9),
    "sent": 6,
    "time": 7,
    "fits": 4,
}


@dataclass(frozen=True)
class Placement:
    """The cost of a recipe on a given number of devices."""

    world: World
    micro_batches: int
    """Micro-batches per device and step."""
    largest: int | None
    """The largest `batch.micro_batch` to recommend, in sequences; None: not even one fits."""
    memory: dict[str, Memory]
    """Memory per device, by kind of activation checkpointing."""
    sent_bytes: float
    """Bytes that each device sends in a step."""
    seconds: float
    """Time of the whole run."""


def planned_tokens(config: Recipe) -> int:
    steps = config.whole_run()
    return config.batch_sizes().before(steps) * config.batch.sequence_length


def run_lines(config: Recipe, model: Model) -> list[str]:
    length, schedule, batch = config.batch.sequence_length, config.learning_rate(), config.batch
    parameters, tokens = count_parameters(model), planned_tokens(config)
    flops = model_flops(model, sequence_length=length)
    ramp = f", from {batch.ramp_from:,}" if batch.ramp_from else ""
    return [
        f"parameters       {parameters:,}",
        f"tokens per step  {batch.tokens:,}{ramp}",
        f"steps            {config.whole_run():,}, warm-up {schedule.warmup_steps:,}",
        f"tokens           {human(tokens)}, {tokens / parameters:.1f} per parameter",
        f"FLOPs            {flops.total * tokens:.3g}; per token {human(flops.total)} "
        f"(6N + 12LdT), {human(flops.parameters)} (6N)",
        *_muon_lines(config, model),
        f"disk             {_disk_text(config, model)}",
    ]


def _muon_lines(config: Recipe, model: Model) -> list[str]:
    if config.optimizer.kind != "muon":
        return []
    flops = muon_cost(model, World(), itemsize=BF16).flops
    step = model_flops(model, sequence_length=config.batch.sequence_length).total
    share = flops / (flops + step * config.batch.tokens)
    return [
        f"Muon             {flops:.3g} FLOPs a step, {share:.1%} of all; spread over the devices"
    ]


def _disk_text(config: Recipe, model: Model) -> str:
    """Return the disk space of the checkpoints at most, each with fp32 weights and the moments."""
    is_muon = config.optimizer.kind == "muon"
    step = Step(sequences=1, length=1, moments=config.optimizer.moments, muon=is_muon)
    size = FP32 * count_parameters(model) + moment_bytes(model, step)
    counts = most_checkpoints(config)
    parts = ", ".join(f"{count:,} ({name})" for name, count in counts.items() if name != SAVING)
    spare = " and one more while saving" if SAVING in counts else ""
    return f"{_gb(sum(counts.values()) * size)} GB: checkpoints of {_gb(size)} GB, {parts}{spare}"


def kept_lines(config: Recipe, memory: dict[str, Memory]) -> list[str]:
    batch = config.batch
    mode = "eager" if config.system.compile is False else "compiled"
    sizes = ", ".join(f"{name} {_gb(estimate.activations)}" for name, estimate in memory.items())
    return [
        f"activations      {sizes} GB, of {batch.micro_batch} x "
        f"{batch.sequence_length:,} tokens in bf16, {mode}",
        f"head and loss    {_gb(memory['none'].loss)} GB beside them",
        *([ESTIMATED] if isinstance(config.model, CausalLMConfig) else []),
    ]


def table_lines(placements: list[Placement], hardware: Hardware) -> Iterator[str]:
    limit = MEMORY_GB[hardware.device]
    yield (
        f"GB on each {hardware.device}, which has {limit} (! is too much); GB that it sends in a "
        f"step; time at {hardware.mfu:.0%} MFU"
    )
    yield (
        "fits: the largest batch.micro_batch that divides the step and leaves a tenth of the memory"
    )
    yield ""
    before = sum(list(COLUMNS.values())[:2]) + 2
    heading = "peak by system.activation_checkpointing"
    yield f"{'micro-':>{before + COLUMNS['batches']}}{heading:>63}"
    for row in (COLUMNS, *(_row(placement, limit * 1e9) for placement in placements)):
        cells = [f"{cell:>{width}}" for cell, width in zip(row, COLUMNS.values(), strict=True)]
        cells[1] = f"{cells[1].strip():<{COLUMNS['sharding']}}"
        yield " ".join(cells).rstrip()


def _row(placement: Placement, limit: float) -> tuple[str, ...]:
    memory = placement.memory["none"]
    peaks = (m.peak for m in placement.memory.values())
    return (
        f"{placement.world.devices:,}",
        placement.world.sharding,
        f"{placement.micro_batches:,}",
        *(_gb(b) for b in (memory.weights, memory.gradients, memory.moments, memory.buffers)),
        *(f"{_gb(peak)}{'!' if peak > limit else ' '}" for peak in peaks),
        _gb(placement.sent_bytes),
        human_time(placement.seconds),
        f"{placement.largest:,}" if placement.largest else "-",
    )


def _gb(number: float) -> str:
    gigabytes = number / 1e9
    digits = 2 if gigabytes < 10 else 1 if gigabytes < 1000 else 0
    return f"{gigabytes:,.{digits}f}" if number else "-"
