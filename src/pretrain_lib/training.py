"""The loop: made of public parts only, so that a script of your own can copy it. Floor 9."""

import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from pretrain_lib.banner import banner
from pretrain_lib.checkpoint import TrainingState, save_checkpoint
from pretrain_lib.config import Recipe
from pretrain_lib.corpus import build_dataset
from pretrain_lib.data.batches import Batch, WindowSource, iterate_steps
from pretrain_lib.evaluate.validation import evaluated_bytes, validate
from pretrain_lib.flops import device_peak, model_flops
from pretrain_lib.generation import write_samples
from pretrain_lib.metrics import Metrics, format_train_row, start_trackers
from pretrain_lib.models.hf import Model
from pretrain_lib.open_data import Corpus
from pretrain_lib.optim import build_adamw
from pretrain_lib.resume import resume
from pretrain_lib.run_folder import (
    CHECKPOINTS,
    METRICS,
    SAMPLES,
    begin_run,
    build_manifest,
    write_status,
)
from pretrain_lib.step import StepResult, train_step
from pretrain_lib.watch import StopWatch


@dataclass
class Run:
    """The parts of a run, as the functions below hand them on."""

    config: Recipe
    accelerator: Accelerator
    model: Model
    prepared_model: torch.nn.Module  # the model as Accelerate wrapped it
    optimizer: torch.optim.Optimizer
    corpus: Corpus
    dataset: WindowSource
    state: TrainingState
    manifest: dict
    metrics: Metrics
    watch: StopWatch
    last_step: int
    peak: float | None  # FLOP/s of all devices
    validation_bytes: int | None  # of text, where its size is known
    continued_at: int | None  # the step of its own checkpoint, where all that was due was done
    skipped_in_a_row: int = 0

    @property
    def folder(self) -> Path:
        return Path(self.config.run.dir)


def train(config: Recipe, model: Model, corpus: Corpus, accelerator: Accelerator) -> str:
    """Train `model` as `config` says, from its newest checkpoint if there is one.

    Ends when the schedule or `run.max_steps` is reached ("done"), at a signal, or when
    `run.max_time` is used up ("resumable"), always with a checkpoint. Returns which it was, the
    same on all ranks, and writes it to `status.json` in the run folder.
    """
    config.check(processes=accelerator.num_processes)
    run = _start(config, model, corpus, accelerator)
    schedule = config.learning_rate()
    batches = _batches(run)
    try:
        while True:
            reason = run.watch.reason()
            ended = run.state.step >= run.last_step
            if run.state.step != run.continued_at:
                _evaluate(run, due=ended)
                _sample(run, due=ended)
                _save(run, due=ended or reason is not None)
            if ended or reason is not None:
                break
            started = time.monotonic()
            result = train_step(
                accelerator,
                run.prepared_model,
                run.optimizer,
                next(batches),
                learning_rate=schedule(run.state.step),
                max_grad_norm=config.optimizer.max_grad_norm,
                seed=config.run.seed,
                step=run.state.step,
            )
            _record(run, result, seconds=time.monotonic() - started)
        return _finish(run, None if ended else reason)
    finally:
        batches.close()
        run.dataset.close()
        run.metrics.close()
        run.watch.close()


def _start(config: Recipe, model: Model, corpus: Corpus, accelerator: Accelerator) -> Run:
    optimizer = build_adamw(
        model.to(accelerator.device),
        learning_rate=config.optimizer.learning_rate,
        betas=config.optimizer.betas,
        epsilon=config.optimizer.epsilon,
        weight_decay=config.optimizer.weight_decay,
    )
    manifest = build_manifest(config, corpus.fingerprint, accelerator)
    start = resume(config, model, optimizer, manifest=manifest)
    state, manifest["parent"] = start.state, start.parent
    prepared_model, prepared_optimizer = accelerator.prepare(model, optimizer)
    folder, last_step = Path(config.run.dir), config.last_step()
    low_precision = accelerator.mixed_precision == "bf16"
    peak = device_peak(accelerator.device, torch.bfloat16 if low_precision else torch.float32)
    if accelerator.is_main_process:
        # Its own checkpoint comes after the rows of its step, another's before them.
        last_row = state.step if start.continues else state.step - 1
        begin_run(folder, config, manifest, step=state.step, last_row=last_row)
    start_trackers(accelerator, config.to_dict())
    metrics = Metrics(folder / METRICS, accelerator, total_steps=last_step, step=state.step)
    dataset = build_dataset(config, corpus, first_window=state.windows, cursor=state.stream)
    for line in banner(config, model, corpus, dataset, accelerator, peak=peak):
        metrics.say(line)
    if start.continues or start.parent:
        metrics.say(f"resumed at step {state.step:,}, window {state.windows:,} of the data")
    for change in start.changes:
        metrics.say(f"changed since: {change}")
    return Run(
        config=config,
        accelerator=accelerator,
        model=model,
        prepared_model=prepared_model,
        optimizer=prepared_optimizer,
        corpus=corpus,
        dataset=dataset,
        state=state,
        manifest=manifest,
        metrics=metrics,
        watch=StopWatch(accelerator, max_time=config.run.max_time),
        last_step=last_step,
        validation_bytes=evaluated_bytes(
            corpus.validation,
            corpus.tokenizer,
            sequence_length=config.batch.sequence_length,
            max_tokens=config.run.evaluate_tokens,
        ),
        continued_at=state.step if start.continues else None,
        peak=None if peak is None else peak * accelerator.num_processes,
    )


def _batches(run: Run) -> Iterator[list[Batch]]:
    """Return this rank's micro-batches of the steps that are left, continuing in the data."""
    config, sizes, first = run.config, run.config.batch_sizes(), run.state.step
    offset = run.state.windows - sizes.before(first)  # not zero in a fork with other batches
    return iterate_steps(
        run.dataset,
        ((offset + sizes.before(s), sizes.at(s)) for s in range(first, run.last_step)),
        micro_batch=config.batch.micro_batch,
        device=run.accelerator.device,
        rank=run.accelerator.process_index,
        world_size=run.accelerator.num_processes,
    )


def _record(run: Run, result: StepResult, *, seconds: float) -> None:
    """Count a finished step, and every `run.log_every` steps write a row about those since."""
    state, config, length = run.state, run.config, run.config.batch.sequence_length
    windows, rate = config.batch_sizes().at(state.step), config.learning_rate()(state.step)
    tokens = windows * length
    state.count_step(windows=windows, tokens=tokens, seconds=seconds)
    if not result.skipped:
        state.row_loss += result.loss * result.targets
        state.row_targets += result.targets
    run.watch.longest_step = max(run.watch.longest_step, seconds)
    _count_skipped(run, result)
    run.metrics.advance()
    if state.step % config.run.log_every and state.step != run.last_step:
        return
    speed = state.row_tokens / state.row_seconds
    flops = model_flops(run.model, sequence_length=length).total
    row = {
        "kind": "train",
        "step": state.step,
        "tokens": state.tokens,
        "loss": state.row_loss / state.row_targets if state.row_targets else math.nan,
        "lr": rate,
        "grad_norm": result.grad_norm,
        "targets": state.row_targets,
        "tokens_per_second": speed,
        "mfu": None if run.peak is None else speed * flops / run.peak,
        "seconds": state.seconds,
    }
    run.metrics.write(row)
    run.metrics.say(format_train_row(row, state.row_tokens, tokens, run.last_step))
    state.begin_row()


def _count_skipped(run: Run, result: StepResult) -> None:
    """Note an update that was left out; too many in a row end the run."""
    if not result.skipped:
        run.skipped_in_a_row = 0
        return
    run.state.skipped += 1
    run.skipped_in_a_row += 1
    reason = f"the gradient norm is {result.grad_norm}, the loss {result.loss}: update left out"
    row = {"kind": "event", "step": run.state.step, "tokens": run.state.tokens, "event": reason}
    run.metrics.write(row)
    run.metrics.say(f"step {run.state.step:,}: {reason}")
    if run.skipped_in_a_row >= run.config.run.max_skipped:
        raise FloatingPointError(
            f"{run.skipped_in_a_row} updates in a row had no finite gradient, up to step "
            f"{run.state.step}: lower optimizer.learning_rate or lengthen schedule.warmup_tokens, "
            f"and resume from a checkpoint before it"
        )


def _evaluate(run: Run, *, due: bool) -> None:
    """Validate at step 0, every `run.evaluate_every` steps and when due."""
    config, state = run.config, run.state
    if run.corpus.validation is None or not (due or state.step % config.run.evaluate_every == 0):
        return
    result = validate(
        run.accelerator,
        run.model,
        run.corpus.validation,
        sequence_length=config.batch.sequence_length,
        micro_batch=config.batch.micro_batch,
        max_tokens=config.run.evaluate_tokens,
        document_masking=config.data.document_masking,
        text_bytes=run.validation_bytes,
    )
    row = {"kind": "validation", "step": state.step, "tokens": run.state.tokens}
    run.metrics.write(row | dataclasses.asdict(result))
    run.metrics.say(f"validation at step {state.step:,}: {result.format()}")


def _sample(run: Run, *, due: bool) -> None:
    """Write samples every `samples.every` steps and when due, on the main process."""
    samples, step = run.config.samples, run.state.step
    wanted = samples.prompts and run.corpus.tokenizer is not None
    if not wanted or not (due or (step and step % samples.every == 0)):
        return
    if run.accelerator.is_main_process:
        texts = write_samples(
            run.folder / SAMPLES,
            run.model,
            run.corpus.tokenizer,
            samples,
            step=step,
            seed=run.config.run.seed,
        )
        for text in texts:
            run.metrics.say(f"sample at step {step:,}: {text!r}")


def _save(run: Run, *, due: bool) -> None:
    """Write a checkpoint by steps, by tokens, or when due."""
    config, state = run.config, run.state
    if not (due or config.save_is_due(state.step, state.tokens)):
        return
    started = time.monotonic()
    if run.accelerator.is_main_process:
        run.metrics.sync()
        state.stream = run.dataset.cursor(state.windows)
        path = save_checkpoint(
            run.folder / CHECKPOINTS,
            state,
            run.model,
            run.optimizer,
            tokenizer=run.corpus.tokenizer,
            manifest=run.manifest,
            keep_last=config.run.keep_last,
        )
        write_status(run.folder, "running", step=state.step)
        run.metrics.say(f"saved {path} in {time.monotonic() - started:.1f} s")
    run.accelerator.wait_for_everyone()
    run.watch.longest_save = max(run.watch.longest_save, time.monotonic() - started)


def _finish(run: Run, stopped_by: str | None) -> str:
    """Say how the run ended, on the console and in `status.json`, and return it."""
    run.accelerator.end_training()
    state = "resumable" if stopped_by else "done"
    reason = stopped_by or f"step {run.last_step} is reached"
    if run.accelerator.is_main_process:
        step, skipped = run.state.step, run.state.skipped
        write_status(run.folder, state, step=step, reason=reason)
        left_out = f"; {skipped} updates were left out" if skipped else ""
        run.metrics.say(f"{state} at step {step:,}: {reason}{left_out}; all is in {run.folder}")
    return state
