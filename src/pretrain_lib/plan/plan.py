"""Report the expected cost of a run, without a GPU (`--plan`)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch

from pretrain_lib.config.rules import check_division, check_together
from pretrain_lib.config.settings import Recipe
from pretrain_lib.data.tokens.foreign import is_foreign, open_foreign
from pretrain_lib.data.tokens.shards import MANIFEST, read_manifest
from pretrain_lib.data.windows.order import WindowOrder
from pretrain_lib.models.blocks import ActivationCheckpointing
from pretrain_lib.models.flops import (
    MEMORY_GB,
    PEAK_TFLOPS,
    Hardware,
    count_parameters,
    model_flops,
)
from pretrain_lib.models.hf import Model, build_model
from pretrain_lib.plan.memory import (
    MOMENTS_BYTES,
    Memory,
    Step,
    estimate_memory,
    model_sizes,
)
from pretrain_lib.plan.network import FP32, World, sent_bytes
from pretrain_lib.run_folder.metrics import human, human_time

BF16 = 2  # bytes
NODES = 4  # in the largest world shown by default
CHECKPOINTING = get_args(ActivationCheckpointing)
COLUMNS = {
    "devices": 7,
    "sharding": 11,
    "batches": 7,
    "weights": 7,
    "gradients": 9,
    "moments": 7,
    "buffers": 7,
    **dict.fromkeys(CHECKPOINTING, 9),
    "sent": 8,
    "time": 7,
}


@dataclass(frozen=True)
class Placement:
    """The cost of a recipe on a given number of devices."""

    world: World
    micro_batches: int
    """Micro-batches per device and step."""
    memory: dict[str, Memory]
    """Memory per device, by kind of activation checkpointing."""
    sent_bytes: float
    """Bytes that each device sends in a step."""
    seconds: float
    """Time of the whole run."""


def format_plan(config: Recipe, hardware: Hardware) -> str:
    """Return the report: steps, FLOPs, disk, and a table of memory, communication and time.

    The table is for `system.processes` devices, or by default for 1 device, one machine and four
    machines. The report ends with warnings if the batch does not divide, the memory does not
    suffice, or data is read more than once.
    """
    _check(config)
    config = config.with_text(_tokens_to_train_on(config))
    with torch.device("meta"):
        model = build_model(config.model)
    asked, node = config.system.processes, hardware.node
    shown = (1, node, NODES * node)
    numbers = [asked] if asked else [n for n in shown if n == 1 or divides(config, n)]
    worlds = [w for number in dict.fromkeys(numbers) for w in worlds_of(number, config, node)]
    placements = [place(config, model, world, hardware) for world in worlds]
    lines = [
        *_run_lines(config, model),
        *_kept_lines(config, placements[0].memory),
        "",
        *_table_lines(placements, hardware),
        *(f"warning: {text}" for text in warnings(config, placements, hardware)),
    ]
    return "\n".join(lines)


def _check(config: Recipe) -> None:
    """Raise ValueError as `Recipe.check` does, except for a batch that does not divide."""
    config.check_values()
    check_together(config)
    if divides(config, 1):
        config.check(processes=1)


def divides(config: Recipe, devices: int) -> bool:
    """Return whether each step consists of whole micro-batches on `devices` devices."""
    try:
        check_division(config, processes=devices)
    except ValueError:
        return False
    return True


def worlds_of(devices: int, config: Recipe, node: int) -> list[World]:
    """Return the sharding strategies for `devices` devices, with `node` per machine."""
    if devices == 1:
        return [World()]
    gathered = BF16 if config.system.fsdp_param_dtype == "bf16" else FP32
    groups = [1, devices]
    if devices > node > 1 and devices % node == 0:
        groups.append(node)
    return [World(devices, group, gathered if group > 1 else FP32) for group in groups]


def place(config: Recipe, model: Model, world: World, hardware: Hardware) -> Placement:
    """Estimate the cost of a run on these devices, with matrix products in bf16."""
    batch = config.batch
    unit = world.devices * batch.micro_batch * batch.sequence_length
    micro_batches = max(1, round(batch.tokens / unit))
    step = Step(
        sequences=batch.micro_batch,
        length=batch.sequence_length,
        micro_batches=micro_batches,
        moments=config.optimizer.moments,
        compiled=config.system.compile is not False,
    )
    rate = PEAK_TFLOPS[hardware.device] * 1e12 * hardware.mfu * world.devices
    operations = model_flops(model, sequence_length=batch.sequence_length).total
    return Placement(
        world=world,
        micro_batches=micro_batches,
        memory={
            kind: estimate_memory(model, replace(step, activation_checkpointing=kind), world)
            for kind in CHECKPOINTING
        },
        sent_bytes=sent_bytes(model_sizes(model), world, micro_batches=micro_batches),
        seconds=operations * _planned_tokens(config) / rate,
    )


def warnings(config: Recipe, placements: list[Placement], hardware: Hardware) -> Iterator[str]:
    """Yield warnings about a planned run."""
    try:
        check_division(config, processes=placements[0].world.devices)
    except ValueError as error:
        yield f"{error}, which the table is for"
    limit, chosen = MEMORY_GB[hardware.device], config.system.activation_checkpointing
    full = [p.world for p in placements if p.memory[chosen].peak > limit * 1e9]
    if full:
        where = ", ".join(f"{world.devices} ({world.sharding})" for world in full)
        yield (
            f"with system.activation_checkpointing={chosen} a step does not fit {limit:g} GB of "
            f"{hardware.device} on {where}: lower batch.micro_batch, compute more again, or shard "
            f"over more devices"
        )
    yield from _data_warnings(config)


def _tokens_to_train_on(config: Recipe) -> int:
    """Return the number of tokens that `schedule.epochs` are made of, or 0 if it is not set."""
    if config.schedule.epochs is None:
        return 0
    tokens = [_tokens_on_disk(path) for path in _paths(config)]
    if not tokens or None in tokens:
        raise ValueError(
            f"schedule.epochs={config.schedule.epochs}: to plan the run, --data.path must be a "
            f"prepared folder or an array of tokens; or set schedule.tokens"
        )
    return sum(tokens)


def _paths(config: Recipe) -> list[str]:
    path = config.data.path
    return [path] if isinstance(path, str) else list(path or ())


def _data_warnings(config: Recipe) -> Iterator[str]:
    data, paths = config.data, _paths(config)
    tokens = [_tokens_on_disk(path) for path in paths]
    if data.streaming or not paths or None in tokens:
        return
    length = config.batch.sequence_length
    weights = tuple(data.weights) if data.weights else None
    order = WindowOrder(tuple(tokens), length, config.run.seed, weights)
    windows = config.batch_sizes().before(config.learning_rate().total_steps)
    for path, count, epochs in zip(paths, tokens, order.planned_epochs(windows), strict=True):
        if round(epochs, 2) > 1:
            yield (
                f"data.path={path} holds {count:,} tokens to train on: the run reads them "
                f"{epochs:.2f} times"
            )


def _tokens_on_disk(path: str) -> int | None:
    """Return the number of training tokens of a path, or None if it does not exist (yet)."""
    folder = Path(path).expanduser()
    if is_foreign(path):
        there = any(folder.parent.glob(folder.name))
        return len(open_foreign(folder, vocabulary_size=None)) if there else None
    there = (folder / MANIFEST).is_file()
    return read_manifest(folder)["splits"]["train"]["tokens"] if there else None


def _planned_tokens(config: Recipe) -> int:
    steps = config.learning_rate().total_steps
    return config.batch_sizes().before(steps) * config.batch.sequence_length


def _run_lines(config: Recipe, model: Model) -> list[str]:
    length, schedule, batch = config.batch.sequence_length, config.learning_rate(), config.batch
    parameters, tokens = count_parameters(model), _planned_tokens(config)
    flops = model_flops(model, sequence_length=length)
    ramp = f", from {batch.ramp_from:,}" if batch.ramp_from else ""
    return [
        f"parameters       {parameters:,}",
        f"tokens per step  {batch.tokens:,}{ramp}",
        f"steps            {schedule.total_steps:,}, warm-up {schedule.warmup_steps:,}",
        f"tokens           {human(tokens)}, {tokens / parameters:.1f} per parameter",
        f"FLOPs            {flops.total * tokens:.3g}; per token {human(flops.total)} "
        f"(6N + 12LdT), {human(flops.parameters)} (6N)",
        f"disk             {_disk_text(config, parameters)}",
    ]


def _disk_text(config: Recipe, parameters: int) -> str:
    """Return the disk space of the checkpoints, each with fp32 weights and both moments."""
    checkpoint, steps = config.checkpoint, config.learning_rate().total_steps
    size = parameters * (FP32 + MOMENTS_BYTES[config.optimizer.moments])
    saves = 1
    saves += steps // checkpoint.every if checkpoint.every else 0
    saves += _planned_tokens(config) // checkpoint.every_tokens if checkpoint.every_tokens else 0
    kept = min(saves, checkpoint.keep_last or saves)
    for_ever = (
        steps // checkpoint.keep_every if checkpoint.keep_every and checkpoint.keep_last else 0
    )
    more = f" and {for_ever:,} (checkpoint.keep_every)" if for_ever else ""
    total = (kept + for_ever + 1) * size
    return (
        f"{_gb(total)} GB: checkpoints of {_gb(size)} GB, {kept:,} (checkpoint.keep_last){more} "
        f"and one more while saving"
    )


def _kept_lines(config: Recipe, memory: dict[str, Memory]) -> list[str]:
    batch = config.batch
    kept = ", ".join(f"{name} {_gb(some.activations)}" for name, some in memory.items())
    return [
        f"activations      {kept} GB by checkpointing, of {batch.micro_batch} x "
        f"{batch.sequence_length:,} tokens in bf16",
        f"head and loss    {_gb(memory['none'].loss)} GB beside them",
    ]


def _table_lines(placements: list[Placement], hardware: Hardware) -> Iterator[str]:
    limit = MEMORY_GB[hardware.device]
    yield (
        f"GB on each {hardware.device}, which has {limit} (! is too much); GB that it sends in a "
        f"step; time at {hardware.mfu:.0%} MFU"
    )
    yield ""
    before = sum(list(COLUMNS.values())[:2]) + 2
    heading = "peak by system.activation_checkpointing"
    yield f"{'micro-':>{before + COLUMNS['batches']}}{heading:>65}"
    for row in (COLUMNS, *(_row(placement, limit * 1e9) for placement in placements)):
        cells = [f"{cell:>{width}}" for cell, width in zip(row, COLUMNS.values(), strict=True)]
        cells[1] = f"{cells[1].strip():<{COLUMNS['sharding']}}"
        yield " ".join(cells).rstrip()


def _row(placement: Placement, limit: float) -> tuple[str, ...]:
    some = placement.memory["none"]
    peaks = (m.peak for m in placement.memory.values())
    return (
        f"{placement.world.devices:,}",
        placement.world.sharding,
        f"{placement.micro_batches:,}",
        *(_gb(b) for b in (some.weights, some.gradients, some.moments, some.buffers)),
        *(f"{_gb(peak)}{'!' if peak > limit else ' '}" for peak in peaks),
        _gb(placement.sent_bytes),
        human_time(placement.seconds),
    )


def _gb(number: float) -> str:
    gigabytes = number / 1e9
    digits = 2 if gigabytes < 10 else 1 if gigabytes < 1000 else 0
    return f"{gigabytes:,.{digits}f}" if number else "-"
