"""The loop: made of public parts only, so that a script of your own can copy it."""

import math
import time

from accelerate import Accelerator

from pretrain_lib.checkpoint.writer import Saved
from pretrain_lib.config.settings import Recipe
from pretrain_lib.corpus.paths import Corpus
from pretrain_lib.data.windows.batches import Batch
from pretrain_lib.distributed.launched import on_main
from pretrain_lib.errors import LocalFault, raised_here
from pretrain_lib.models.flops import model_flops
from pretrain_lib.models.hf import Model
from pretrain_lib.optim.spikes import Limits, spike_limits
from pretrain_lib.run_folder.folder import write_status
from pretrain_lib.run_folder.metrics import format_train_row
from pretrain_lib.training.evaluation import evaluate_if_due, is_due
from pretrain_lib.training.rollback import turn_back_or_go_on
from pretrain_lib.training.run import Run, open_batches, start_run, tell
from pretrain_lib.training.step import StepResult, accumulate_gradients, apply_update


def train(config: Recipe, model: Model, corpus: Corpus, accelerator: Accelerator) -> str:
    """Train `model` as `config` says, from its newest checkpoint if there is one.

    Ends when the schedule or `run.max_steps` is reached ("done"), at a signal, or when
    `run.max_time` is used up ("resumable"), always with a checkpoint. Returns which it was, the
    same on all ranks, and writes it to `status.json` in the run folder.
    """
    config.check(processes=accelerator.num_processes)
    run = start_run(config, model, corpus, accelerator)
    batches = open_batches(run)
    try:
        while True:
            step = run.state.step
            ended, is_new = step >= run.last_step, step != run.continued_at
            if is_new:
                _evaluate(run)
            reason = run.watch.reason(evaluation_next=is_due(run, step + 1))
            if is_new:
                _save(run, due=ended or reason is not None)
            if ended or reason is not None:
                return _finish(run, None if ended else reason)
            started = time.monotonic()
            result, limits = _step(run, next(batches))
            _record(run, result, seconds=time.monotonic() - started)
            if result.skipped and turn_back_or_go_on(run, result, limits):
                batches.close()
                batches = open_batches(run)  # which now goes on behind the spike
    except Exception as error:
        _note_saved(run)  # a checkpoint that was begun is a good one
        if isinstance(error, ValueError) and raised_here(error):
            raise LocalFault(str(error)) from error
        raise
    finally:
        batches.close()
        run.dataset.close()
        run.metrics.close()
        run.watch.close()


def _step(run: Run, micro_batches: list[Batch]) -> tuple[StepResult, Limits]:
    """Make one optimizer step; return what it did, and above which limits it would not have."""
    config, state = run.config, run.state
    settings = {"sigma": config.stability.spike_sigma, "window": config.stability.spike_window}
    limits = spike_limits(state.recent, **settings)
    accumulated = accumulate_gradients(
        run.accelerator, run.prepared_model, micro_batches, seed=config.run.seed, step=state.step
    )
    _note_saved(run)  # the writer reads what the update changes
    result = apply_update(
        run.accelerator,
        run.prepared_model,
        run.optimizer,
        accumulated,
        learning_rate=config.learning_rate()(state.step),
        max_grad_norm=config.optimizer.max_grad_norm,
        loss_limit=limits.loss,
        norm_limit=limits.norm,
    )
    return result, limits


def _record(run: Run, result: StepResult, *, seconds: float) -> None:
    """Count a finished step, and every `log.every` steps write a row about those since."""
    state, config, length = run.state, run.config, run.config.batch.sequence_length
    windows, rate = config.batch_sizes().at(state.step), config.learning_rate()(state.step)
    tokens = windows * length
    state.count_step(windows=windows, tokens=tokens, seconds=seconds)
    if not result.skipped:
        state.row_loss += result.loss * result.targets
        state.row_targets += result.targets
        state.skipped_in_a_row = 0
        if config.stability.spike_sigma is not None:
            state.recent = [*state.recent, [result.loss, result.grad_norm]]
            state.recent = state.recent[-config.stability.spike_window :]
    run.watch.longest_step = max(run.watch.longest_step, seconds)
    run.metrics.advance()
    if state.step % config.log.every and state.step != run.last_step:
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


def _evaluate(run: Run) -> None:
    """Validate, score and write samples; if that fails, what was trained is saved first."""
    try:
        evaluate_if_due(run)
    except Exception:
        _save(run, due=True)
        raise


def _save(run: Run, *, due: bool) -> None:
    """Begin to write a checkpoint by steps, by tokens, or when due."""
    state = run.state
    if not (due or run.config.save_is_due(state.step, state.tokens)):
        return
    _note_saved(run)
    if run.accelerator.is_main_process:
        run.metrics.sync()
        state.stream = run.dataset.cursor(state.windows)
    run.writer.start(state, run.model, run.optimizer)


def _note_saved(run: Run) -> Saved | None:
    """Wait for the checkpoint that is being written, if one is, and say what became of it."""
    saved = run.writer.wait()
    if saved is None:
        return None
    run.watch.longest_save = max(run.watch.longest_save, saved.seconds)
    if saved.error is None:
        if run.accelerator.is_main_process:
            write_status(run.folder, "running", step=saved.step)
        run.metrics.say(f"saved {saved.path} in {saved.seconds:.1f} s")
    else:
        tell(run, "not_saved", f"the checkpoint could not be written: {saved.error}")
    return saved


def _finish(run: Run, stopped_by: str | None) -> str:
    """Say how the run ended, on the console and in `status.json`, and return it."""
    saved = _note_saved(run)
    failed = bool(saved and saved.error)
    failed = on_main(run.accelerator, lambda: failed)
    _leave_group(run)
    state = "resumable" if stopped_by or failed else "done"
    reason = stopped_by or f"step {run.last_step} is reached"
    if failed:
        reason += ", but its checkpoint could not be written: make room and start again"
    if run.accelerator.is_main_process:
        now = run.state
        write_status(run.folder, state, step=now.step, reason=reason)
        notes = [f"{now.skipped} updates were left out"] if now.skipped else []
        if now.best_loss is not None:
            notes += [f"best validation loss {now.best_loss:.4f} at step {now.best_step:,}"]
        text = "; ".join([reason, *notes, f"all is in {run.folder}"])
        run.metrics.say(f"{state} at step {now.step:,}: {text}")
    return state


def _leave_group(run: Run) -> None:
    """Leave the other processes.

    DDP goes first. The last to hold a group waits for its threads, and DDP does so in a way in
    which they may wait for it: torch's gloo then hangs for ever.
    """
    run.prepared_model = None
    run.accelerator.free_memory()
    run.accelerator.end_training()
