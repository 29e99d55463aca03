"""Report the expected cost of a run, without a GPU (`--plan`)."""

from collections.abc import Iterator

import torch

from pretrain_lib.config.derived_defaults import listed
from pretrain_lib.config.rules import check_division, check_together
from pretrain_lib.config.settings import Recipe
from pretrain_lib.data.tokens.foreign import is_foreign, open_array
from pretrain_lib.data.tokens.headerless import IdType
from pretrain_lib.data.tokens.places import open_place
from pretrain_lib.data.tokens.shards import MANIFEST, read_manifest
from pretrain_lib.data.windows.order import WindowOrder
from pretrain_lib.models.any_model import build_model, check_model
from pretrain_lib.models.flops import (
    MEMORY_GB,
    PEAK_TFLOPS,
    Hardware,
    model_flops,
)
from pretrain_lib.models.interface import Model
from pretrain_lib.plan.memory import estimate_memory, model_sizes
from pretrain_lib.plan.micro_batch import Planned, divides
from pretrain_lib.plan.muon import muon_cost
from pretrain_lib.plan.network import FP32, World, sent_bytes
from pretrain_lib.plan.step import COMPUTE_BYTES
from pretrain_lib.plan.text import (
    BF16,
    CHECKPOINTING,
    Placement,
    kept_lines,
    planned_tokens,
    run_lines,
    table_lines,
)

NODES = 4  # in the largest world shown by default


def format_plan(config: Recipe, hardware: Hardware) -> str:
    """Return the report: steps, FLOPs, disk, and a table of memory, communication and time.

    The table is for `system.processes` devices, or by default for 1 device, one machine and four
    machines; it names the largest `batch.micro_batch` that fits. The report ends with warnings if
    the batch does not divide, the memory does not suffice, or data is read more than once.
    """
    _check(config)
    config = config.with_text(_tokens_to_train_on(config))
    with torch.device("meta"):
        model = build_model(config.model)
    processes, node = config.system.processes, hardware.node
    choices = (1, node, NODES * node)
    numbers = [processes] if processes else [n for n in choices if n == 1 or divides(config, n)]
    worlds = [w for number in dict.fromkeys(numbers) for w in worlds_of(number, config, node)]
    planned = Planned(config, documents_per_token(config))
    placements = [place(planned, model, world, hardware) for world in worlds]
    lines = [
        *run_lines(config, model),
        *kept_lines(config, placements[0].memory),
        "",
        *table_lines(placements, hardware),
        *(f"warning: {text}" for text in warnings(config, placements, hardware)),
    ]
    return "\n".join(lines)


def _check(config: Recipe) -> None:
    """Raise ValueError as `Recipe.check` does, except for a batch that does not divide."""
    config.check_values()
    check_model(config.model, document_masking=config.data.document_masking)
    check_together(config)
    if divides(config, 1):
        config.check(processes=1)


def worlds_of(devices: int, config: Recipe, node: int) -> list[World]:
    """Return the sharding strategies for `devices` devices, with `node` per machine."""
    if devices == 1:
        return [World()]
    groups = [1, devices]
    if devices > node > 1 and devices % node == 0:
        groups.append(node)
    return [world_of(config, devices, group) for group in groups]


def world_of(config: Recipe, devices: int, group: int) -> World:
    """Return the parallelism of a run on `devices` devices, sharded over groups of `group`."""
    is_low = config.system.fsdp_param_dtype == "bf16" and group > 1
    return World(devices, group, BF16 if is_low else FP32)


def place(planned: Planned, model: Model, world: World, hardware: Hardware) -> Placement:
    """Estimate the cost of a run on these devices, with matrix products in bf16."""
    config, step = planned.config, planned.step(world)
    sent = sent_bytes(model_sizes(model), world, micro_batches=step.micro_batches)
    rate = PEAK_TFLOPS[hardware.device] * 1e12 * hardware.mfu
    operations = model_flops(model, sequence_length=step.length).total
    operations *= planned_tokens(config) / world.devices
    if step.muon:
        cost = muon_cost(model, world, itemsize=COMPUTE_BYTES[step.precision])
        operations += config.whole_run() * cost.flops
        sent += cost.sent_bytes
    return Placement(
        world=world,
        micro_batches=step.micro_batches,
        largest=planned.largest_micro_batch(model, world, MEMORY_GB[hardware.device]),
        memory={
            kind: estimate_memory(model, planned.step(world, kind=kind), world)
            for kind in CHECKPOINTING
        },
        sent_bytes=sent,
        seconds=operations / rate,
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
            f"{hardware.device} on {where}: lower batch.micro_batch, recompute more "
            f"activations, or shard over more devices"
        )
    yield from _data_warnings(config)


def _tokens_to_train_on(config: Recipe) -> int:
    """Return the number of tokens that `schedule.epochs` are made of, or 0 if it is not set."""
    if config.schedule.epochs is None:
        return 0
    tokens = [_tokens_on_disk(path, config.data.dtype) for path in listed(config.data.path)]
    if not tokens or None in tokens:
        raise ValueError(
            f"schedule.epochs={config.schedule.epochs}: to plan the run, --data.path must be a "
            f"prepared folder or an array of tokens; or set schedule.tokens"
        )
    return sum(tokens)


def _data_warnings(config: Recipe) -> Iterator[str]:
    data, paths = config.data, listed(config.data.path)
    tokens = [_tokens_on_disk(path, config.data.dtype) for path in paths]
    if data.streaming or not paths or None in tokens:
        return
    length = config.batch.sequence_length
    weights = tuple(data.weights) if data.weights else None
    # Of a plan it is known that it has at least as many windows as the tokens fill.
    planned = tuple(-(-n // length) for n in tokens) if data.packing == "best_fit" else None
    names = tuple(map(str, paths))
    order = WindowOrder(tuple(tokens), length, config.run.seed, weights, planned, names)
    windows = config.batch_sizes().before(config.whole_run())
    for path, count, epochs in zip(paths, tokens, order.planned_epochs(windows), strict=True):
        if round(epochs, 2) > 1:
            yield (
                f"data.path={path} holds {count:,} tokens to train on: the run reads them "
                f"{epochs:.2f} times"
            )


def documents_per_token(config: Recipe) -> float:
    """Return how many documents a token has with document masking, as prepared folders say."""
    if not config.data.document_masking:
        return 0
    folders = [open_place(path) for path in listed(config.data.path)]
    splits = [
        read_manifest(folder)["splits"]["train"]
        for folder in folders
        if (folder / MANIFEST).is_file()
    ]
    windows = 1 / config.batch.sequence_length  # of whose documents the last one may go on
    return windows + max((s["documents"] / s["tokens"] for s in splits if s["tokens"]), default=0)


def _tokens_on_disk(path: str, dtype: IdType | None) -> int | None:
    """Return the number of training tokens of a path, or None if it does not exist (yet)."""
    folder = open_place(path)
    if is_foreign(path):
        exists = any(folder.parent.glob(folder.name))
        return len(open_array(folder, vocabulary_size=None, dtype=dtype)) if exists else None
    exists = (folder / MANIFEST).is_file()
    return read_manifest(folder)["splits"]["train"]["tokens"] if exists else None
