"""Describe a run on the console before training starts."""

import torch
from accelerate import Accelerator

from pretrain_lib.config.settings import Recipe
from pretrain_lib.corpus.paths import Corpus
from pretrain_lib.corpus.stretches import choose_stretches
from pretrain_lib.data.windows.batches import PackedDataset, WindowSource
from pretrain_lib.distributed.launch_file import launch_remarks
from pretrain_lib.distributed.sharding import describe_sharding
from pretrain_lib.models.flops import ASSUMED_MFU, count_parameters, model_flops
from pretrain_lib.models.hf import Model
from pretrain_lib.run_folder.metrics import human, human_time


def banner(
    config: Recipe,
    model: Model,
    corpus: Corpus,
    dataset: WindowSource,
    accelerator: Accelerator,
    *,
    peak: float | None,
) -> list[str]:
    """Return the lines that describe data, model, device, batch and schedule of a run."""
    return [
        *_data_lines(config, corpus, dataset),
        _model_line(config, model),
        _device_line(accelerator, peak),
        *_launch_lines(accelerator),
        *_option_lines(config, model),
        *_batch_lines(config, model, accelerator, peak),
    ]


def _data_lines(config: Recipe, corpus: Corpus, dataset: WindowSource) -> list[str]:
    low, high = corpus.id_range
    ids = f"ids {low} to {high}, vocabulary {config.model.vocabulary_size:,}"
    lines = [f"data      {corpus.name}"]
    if isinstance(dataset, PackedDataset):
        tokens = " + ".join(f"{len(source):,}" for source in corpus.train)
        planned = config.batch_sizes().before(config.learning_rate().total_steps)
        epochs = ", ".join(f"{epochs:.2f}" for epochs in dataset.order.planned_epochs(planned))
        lines.append(
            f"          {tokens} tokens ({corpus.dtype}, read from disk as needed), {ids}; "
            f"{epochs} epochs planned"
        )
        padded = [plan.report.padded_share for plan in corpus.plans or ()]
        cut = [plan.report.cut_share for plan in corpus.plans or ()]
        lines += [
            f"          best-fit packing: {share:.2%} padded, {cut_share:.1%} of the documents are "
            f"longer than a window and cut"
            for share, cut_share in zip(padded, cut, strict=True)
        ]
    else:
        lines.append(f"          {corpus.dtype}, {ids}")
    length, limit = config.batch.sequence_length, config.validation.tokens
    stretches = choose_stretches(corpus.validation, length, max_tokens=limit)
    lines += [
        f"          validation on {stretch.windows * length:,} of {len(text.tokens):,} held-out "
        f"tokens{f' of {text.name}' if len(stretches) > 1 else ''} ({text.rule})"
        for stretch, text in zip(stretches, corpus.validation, strict=True)
    ]
    return lines


def _model_line(config: Recipe, model: Model) -> str:
    shape = config.model
    name = type(shape).__name__.removesuffix("Config")
    return (
        f"model     {name}, {count_parameters(model):,} parameters: "
        f"{shape.num_layers} layers, {shape.num_heads} heads, width {shape.width}, "
        f"context {shape.context_length}"
    )


def _option_lines(config: Recipe, model: Model) -> list[str]:
    """Return one line with the non-default training options, or none if there are none."""
    options, chosen = model.options, []
    if options.compiled:
        chosen.append("compiled blocks and loss (the first step waits for the compiler)")
    if (kind := config.system.activation_checkpointing) != "none":
        chosen.append(f"activation checkpointing: {kind}")
    if config.optimizer.moments != "fp32":
        chosen.append(f"moments in {config.optimizer.moments}")
    if options.z_loss:
        chosen.append(f"z-loss {options.z_loss:g}")
    return [f"          {', '.join(chosen)}"] if chosen else []


def _device_line(accelerator: Accelerator, peak: float | None) -> str:
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    if device.type == "cpu":
        threads = torch.get_num_threads()
        name = f"CPU with {threads} thread{'s' * (threads != 1)}"
    precision = {"no": "fp32", "bf16": "bf16 autocast, fp32 weights"}[accelerator.mixed_precision]
    sharding = describe_sharding(accelerator)
    rate = "" if peak is None else f", {peak / 1e12:.3g} TFLOP/s taken as its peak"
    return f"device    {accelerator.num_processes} x {name}, {precision}, {sharding}{rate}"


def _launch_lines(accelerator: Accelerator) -> list[str]:
    remarks = launch_remarks(processes=accelerator.num_processes)
    return [f"          {remark}" for remark in remarks]


def _batch_lines(
    config: Recipe, model: Model, accelerator: Accelerator, peak: float | None
) -> list[str]:
    batch, schedule = config.batch, config.learning_rate()
    micro_batches = batch.tokens // (
        batch.micro_batch * batch.sequence_length * accelerator.num_processes
    )
    tokens = config.batch_sizes().before(schedule.total_steps) * batch.sequence_length
    eta = ""
    if peak is not None:
        flops = model_flops(model, sequence_length=batch.sequence_length).total * tokens
        seconds = flops / (peak * accelerator.num_processes * ASSUMED_MFU)
        eta = f"; {human_time(seconds)} at {ASSUMED_MFU:.0%} of the peak"
    return [
        f"batch     {batch.tokens:,} tokens a step = {accelerator.num_processes} x {micro_batches} "
        f"x {batch.micro_batch} x {batch.sequence_length} (processes, micro-batches, sequences, "
        f"tokens)",
        f"schedule  {schedule.total_steps:,} steps = {human(tokens)} tokens, {schedule.kind} from "
        f"{schedule.peak:g} to {schedule.floor:g} after {schedule.warmup_steps:,} steps of "
        f"warm-up{eta}",
        f"run       {config.run.dir}",
    ]
