"""Describe a run on the console before training starts."""

import torch
from accelerate import Accelerator

from pretrain_lib.config.settings import Recipe
from pretrain_lib.corpus.paths import Corpus
from pretrain_lib.corpus.stretches import choose_stretches
from pretrain_lib.data.windows.batches import PackedDataset, WindowSource
from pretrain_lib.distributed.launch_file import launch_remarks
from pretrain_lib.distributed.sharding import describe_sharding, shard_group
from pretrain_lib.models.any_model import name_class
from pretrain_lib.models.flops import count_parameters
from pretrain_lib.models.interface import Model
from pretrain_lib.plan.micro_batch import Planned
from pretrain_lib.plan.plan import documents_per_token, world_of
from pretrain_lib.run_folder.folder import PRECISIONS
from pretrain_lib.run_folder.metrics import human
from pretrain_lib.training.console_lines import fill
from pretrain_lib.wording import plural

INDENT = 10  # of what follows the labels
MOST_EPOCHS = 4  # beyond which repeated data stops helping (Muennighoff et al. 2023)


def banner(
    config: Recipe, model: Model, corpus: Corpus, dataset: WindowSource, accelerator: Accelerator
) -> list[str]:
    """Return the lines that describe data, model, device, batch and schedule of a run.

    They end with a warning if the data is read too often.
    """
    lines = [
        *_data_lines(config, corpus, dataset),
        _model_line(config, model),
        _device_line(accelerator),
        *_launch_lines(accelerator),
        *_option_lines(config, model),
        _batch_line(config, accelerator),
        *_memory_lines(config, model, accelerator),
        _schedule_line(config),
        f"run       {config.run.dir}",
        *_epoch_warnings(config, corpus, dataset),
    ]
    return [fill(line, indent=INDENT) for line in lines]


def _data_lines(config: Recipe, corpus: Corpus, dataset: WindowSource) -> list[str]:
    lines = [f"data      {corpus.name}"]
    if isinstance(dataset, PackedDataset):
        epochs = _planned_epochs(config, dataset)
        for source, times in zip(corpus.train, epochs, strict=True):
            lines.append(f"          {plural(len(source), 'token')} to train on, {_times(times)}")
        for plan in corpus.plans or ():
            report = plan.report
            lines.append(
                f"          best-fit packing: {report.padded_share:.2%} padded, "
                f"{report.cut_share:.1%} of the documents are longer than a window and cut"
            )
    lines.append(f"          vocabulary of {config.model.vocabulary_size:,} tokens, {corpus.dtype}")
    return [*lines, *_validation_lines(config, corpus)]


def _validation_lines(config: Recipe, corpus: Corpus) -> list[str]:
    if not corpus.validation:
        return ["          validation is off (data.validation=none)"]
    length, limit = config.batch.sequence_length, config.validation.tokens
    stretches = choose_stretches(corpus.validation, length, max_tokens=limit)
    return [
        f"          validation on {stretch.windows * length:,} of {len(text.tokens):,} held-out "
        f"tokens{f' of {text.name}' if len(stretches) > 1 else ''} ({text.rule})"
        for stretch, text in zip(stretches, corpus.validation, strict=True)
    ]


def _planned_epochs(config: Recipe, dataset: PackedDataset) -> list[float]:
    planned = config.batch_sizes().before(config.whole_run())
    return list(dataset.order.planned_epochs(planned))


def _times(epochs: float) -> str:
    if epochs <= 1:
        return f"of which the schedule reads {epochs:.1%}, each at most once"
    return f"which the schedule reads {epochs:,.{2 if epochs < 100 else 0}f} times"


def _epoch_warnings(config: Recipe, corpus: Corpus, dataset: WindowSource) -> list[str]:
    """Return a warning for each source that is read more than `MOST_EPOCHS` times."""
    if not isinstance(dataset, PackedDataset):
        return []
    epochs = _planned_epochs(config, dataset)
    tokens = [len(source) for source in corpus.train]
    total = config.batch_sizes().before(config.whole_run())
    total *= config.batch.sequence_length
    lines = []
    for number, (times, count) in enumerate(zip(epochs, tokens, strict=True)):
        if times > MOST_EPOCHS:
            which = f" of path {number + 1} of data.path" if len(tokens) > 1 else ""
            enough = max(1, int(total * MOST_EPOCHS / times))
            lines.append(
                f"WARNING   {times:,.0f} epochs planned{which}: repeated data stops helping beyond "
                f"about {MOST_EPOCHS} epochs (Muennighoff et al. 2023, "
                f"https://arxiv.org/abs/2305.16264). Add text to the {plural(count, 'token')} "
                f"there are, or train on fewer: --schedule.tokens {enough} makes it {MOST_EPOCHS}"
            )
    return lines


def _model_line(config: Recipe, model: Model) -> str:
    shape = config.model
    name = name_class(shape)
    return (
        f"model     {name}, {count_parameters(model):,} parameters: "
        f"{plural(shape.num_layers, 'layer')}, {plural(shape.num_heads, 'head')}, "
        f"width {shape.width}, context of {plural(shape.context_length, 'token')}"
    )


def _option_lines(config: Recipe, model: Model) -> list[str]:
    """Return lines with the training options that are not the default, if any."""
    options, lines, chosen = model.options, [], []
    if options.compiled:
        lines.append("compiled blocks and loss (the first step waits for the compiler)")
    if (kind := config.system.activation_checkpointing) != "none":
        chosen.append(f"activation checkpointing: {kind}")
    if config.optimizer.kind == "muon":
        chosen.append("Muon for the matrices of the layers")
    if config.optimizer.moments != "fp32":
        chosen.append(f"moments in {config.optimizer.moments}")
    if options.z_loss:
        chosen.append(f"z-loss {options.z_loss:g}")
    lines += [", ".join(chosen)] if chosen else []
    return [f"          {line}" for line in lines]


def _device_line(accelerator: Accelerator) -> str:
    device, processes = accelerator.device, accelerator.num_processes
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    if device.type == "cpu":
        name = f"CPU with {plural(torch.get_num_threads(), 'thread')}"
    parts = [name, PRECISIONS[accelerator.mixed_precision]]
    if processes > 1:
        parts = [f"{processes} processes, each on: {name}", *parts[1:]]
        parts.append(describe_sharding(accelerator))
    return f"device    {', '.join(parts)}"


def _launch_lines(accelerator: Accelerator) -> list[str]:
    remarks = launch_remarks(processes=accelerator.num_processes)
    return [f"          {remark}" for remark in remarks]


def _batch_line(config: Recipe, accelerator: Accelerator) -> str:
    """Return the line that takes a step's tokens apart; factors of 1 are left out."""
    batch, processes = config.batch, accelerator.num_processes
    micro_batches = batch.tokens // (batch.micro_batch * batch.sequence_length * processes)
    factors = [
        *([f"{processes} processes"] if processes > 1 else []),
        *([f"{micro_batches:,} micro-batches"] if micro_batches > 1 else []),
        plural(batch.micro_batch, "sequence"),
        plural(batch.sequence_length, "token"),
    ]
    ramp = ""
    if batch.ramp_from:
        ramp = f", growing from {batch.ramp_from:,} over the first {human(batch.ramp_tokens)}"
    return f"batch     {plural(batch.tokens, 'token')} a step = {' x '.join(factors)}{ramp}"


def _memory_lines(config: Recipe, model: Model, accelerator: Accelerator) -> list[str]:
    """Return a line with the memory that a step is expected to take of a GPU, if there is one."""
    if accelerator.device.type != "cuda":
        return []
    memory_gb = torch.cuda.get_device_properties(accelerator.device).total_memory / 1e9
    precision = "fp32" if accelerator.mixed_precision == "no" else "bf16"
    planned = Planned(config, documents_per_token(config), precision)
    world = world_of(config, accelerator.num_processes, shard_group(accelerator))
    return [f"memory    {planned.memory_line(model, world, memory_gb)}"]


def _schedule_line(config: Recipe) -> str:
    schedule = config.learning_rate()
    steps = config.whole_run()
    tokens = config.batch_sizes().before(steps) * config.batch.sequence_length
    shape = schedule.kind
    if shape == "wsd":
        decay = plural(schedule.decay_steps, "step")
        shape = f"constant, then {schedule.decay_shape} over the last {decay}"
    shape += "" if schedule.kind == "constant" else f" to {schedule.floor:g}"
    shape += (
        f", then {plural(rest, 'step')} there" if (rest := steps - schedule.total_steps) else ""
    )
    return (
        f"schedule  {plural(steps, 'step')}, {human(tokens)} tokens; learning rate: "
        f"{plural(schedule.warmup_steps, 'step')} of warm-up to {schedule.peak:g}, then {shape}"
    )
