"""Assemble a run from a recipe, a model, data and an Accelerator."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator

from pretrain_lib.checkpoint.parts import checkpoint_bytes
from pretrain_lib.checkpoint.state import TrainingState
from pretrain_lib.checkpoint.writer import CheckpointWriter
from pretrain_lib.config.settings import Recipe
from pretrain_lib.corpus.corpus import build_dataset
from pretrain_lib.corpus.paths import Corpus
from pretrain_lib.corpus.stretches import Stretch, choose_stretches, identify
from pretrain_lib.data.windows.batches import Batch, WindowSource, iterate_steps
from pretrain_lib.distributed.launched import on_all
from pretrain_lib.distributed.sharding import writes_by_one
from pretrain_lib.evaluate.tasks import Tasks, open_scored_tasks
from pretrain_lib.models.interface import Model
from pretrain_lib.run_folder.folder import (
    CHECKPOINTS,
    METRICS,
    await_run_folder,
    begin_run,
    build_manifest,
)
from pretrain_lib.run_folder.metrics import Metrics, start_trackers
from pretrain_lib.training.banner import banner
from pretrain_lib.training.console_lines import fill
from pretrain_lib.training.early_stop import StopWatch
from pretrain_lib.training.first_weights import set_first_weights
from pretrain_lib.training.measurements import TimeLeft, peak_of_all
from pretrain_lib.training.placement import place
from pretrain_lib.training.profiler import PROFILE, StepProfiler
from pretrain_lib.training.resume import Start, drop_later_checkpoints, resume

SLOW_DISK = 5e8  # bytes per second, assumed until a save has been measured


@dataclass
class Run:
    """The parts of a run."""

    config: Recipe
    accelerator: Accelerator
    model: Model
    prepared_model: torch.nn.Module  # the model as wrapped by Accelerate
    optimizer: torch.optim.Optimizer
    corpus: Corpus
    dataset: WindowSource
    state: TrainingState
    manifest: dict
    metrics: Metrics
    watch: StopWatch
    writer: CheckpointWriter
    last_step: int
    peak: float | None  # FLOP/s of all devices
    stretches: tuple[Stretch, ...]  # of held-out text, for validation
    tasks: Tasks | None  # to score on; on the main process only
    profiler: StepProfiler
    continued_at: int | None  # step resumed from, if not a fork
    time_left: TimeLeft = field(default_factory=TimeLeft)

    @property
    def folder(self) -> Path:
        return Path(self.config.run.dir)

    @cached_property
    def validated(self) -> str:
        """Identifies what the validation loss is measured on."""
        return identify(self.stretches, document_masking=self.config.data.document_masking)


def start_run(config: Recipe, model: Model, corpus: Corpus, accelerator: Accelerator) -> Run:
    """Assemble a run, resuming from its newest checkpoint if there is one.

    First the model is placed, then the state is loaded or initialized, and then data, metrics and
    checkpoint writer are opened at that state. A model on the meta device is materialized here, so
    that each process allocates only what it holds.
    """
    tasks = open_scored_tasks(config, corpus, accelerator)
    length = config.batch.sequence_length
    stretches = choose_stretches(
        corpus.validation, length, max_tokens=config.validation.tokens, tokenizer=corpus.tokenizer
    )
    has_weights = not next(model.parameters()).is_meta
    prepared_model, optimizer = place(config, model, accelerator)
    manifest = build_manifest(config, corpus, accelerator)
    start = resume(config, model, optimizer, accelerator, manifest=manifest)
    if start.is_new:
        set_first_weights(config, model, has_weights=has_weights)
    manifest |= {"parent": start.parent, "run_id": start.run_id}
    state = start.state
    with ExitStack() as opened:  # what is open is closed again if the rest fails
        dataset = build_dataset(config, corpus, first_window=state.windows, cursor=state.stream)
        opened.callback(dataset.close)
        metrics = _start_metrics(config, manifest, start, accelerator)
        opened.callback(metrics.close)
        profiled = config.system.profile if accelerator.is_main_process else None
        expected = checkpoint_bytes(model, optimizer) / SLOW_DISK
        watch = StopWatch(accelerator, max_time=config.run.max_time, expected_save=expected)
        opened.callback(watch.close)
        run = Run(
            config=config,
            accelerator=accelerator,
            model=model,
            prepared_model=prepared_model,
            optimizer=optimizer,
            corpus=corpus,
            dataset=dataset,
            state=state,
            manifest=manifest,
            metrics=metrics,
            watch=watch,
            writer=_build_writer(config, model, corpus, manifest, accelerator),
            last_step=config.last_step(),
            peak=peak_of_all(accelerator),
            stretches=stretches,
            tasks=tasks,
            profiler=StepProfiler(profiled, Path(config.run.dir) / PROFILE, accelerator.device),
            continued_at=state.step if start.continues else None,
        )
        _announce(run, start)
        opened.pop_all()
    return run


def _start_metrics(
    config: Recipe, manifest: dict, start: Start, accelerator: Accelerator
) -> Metrics:
    """Open metrics and trackers at the step at which the run begins."""
    folder, step = Path(config.run.dir), start.state.step
    if accelerator.is_main_process:
        drop_later_checkpoints(config, start)  # before the rows of their steps
        # A resumed run has the rows of this step already; a new run or a fork has not.
        last_row = step if start.continues else step - 1
        begin_run(folder, config, manifest, start.state, last_row=last_row)
    on_all(lambda: await_run_folder(folder, run_id=start.run_id))
    start_trackers(accelerator, config.to_dict(), run_id=start.run_id)
    return Metrics(folder / METRICS, accelerator, total_steps=config.last_step(), step=step)


def _build_writer(
    config: Recipe, model: Model, corpus: Corpus, manifest: dict, accelerator: Accelerator
) -> CheckpointWriter:
    return CheckpointWriter(
        Path(config.run.dir) / CHECKPOINTS,
        model,
        by_one=writes_by_one(accelerator),
        timeout=config.system.collective_timeout,
        tokenizer=corpus.tokenizer,
        manifest=manifest,
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every,
        keep_best=config.checkpoint.keep_best,
    )


def _announce(run: Run, start: Start) -> None:
    """Print the banner, where the run resumes, and what differs from the checkpoint."""
    for line in banner(run.config, run.model, run.corpus, run.dataset, run.accelerator):
        run.metrics.say(line)
    if not start.is_new:
        step, last = run.state.step, run.last_step
        origin = "" if start.continues else f" of {start.parent}"
        run.metrics.say(f"resumed at step {step:,} of {last:,}, from the checkpoint{origin}")
    for change in start.changes:
        run.metrics.say(f"changed since the checkpoint: {change}")


def open_batches(run: Run) -> Iterator[list[Batch]]:
    """Iterate over the remaining steps, each a list of this rank's micro-batches."""
    config, sizes, first = run.config, run.config.batch_sizes(), run.state.step
    # Nonzero after a rollback, and in a fork with other data.
    offset = run.state.windows - sizes.before(first)
    return iterate_steps(
        run.dataset,
        ((offset + sizes.before(s), sizes.at(s)) for s in range(first, run.last_step)),
        micro_batch=config.batch.micro_batch,
        device=run.accelerator.device,
        rank=run.accelerator.process_index,
        world_size=run.accelerator.num_processes,
    )


def report_event(
    run: Run, event: str, message: str, *, step: int | None = None, **numbers: float
) -> None:
    """Write an event row to the metrics, and print the message."""
    step = run.state.step if step is None else step
    write_event(run, event, message, step=step, **numbers)
    run.metrics.say(fill(f"step {step:,}: {message}"))


def write_event(run: Run, event: str, message: str, *, step: int, **numbers: float) -> None:
    """Write an event row to the metrics."""
    row = {"kind": "event", "step": step, "tokens": run.state.tokens, "event": event}
    run.metrics.write(row | numbers | {"message": message})
