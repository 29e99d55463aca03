"""The training loop, which calls no private function of another module: copy it to change it."""

import math
import time

from accelerate import Accelerator

from pretrain_lib.checkpoint.writer import Saved
from pretrain_lib.config.settings import Recipe
from pretrain_lib.corpus.fit import fit_to_text
from pretrain_lib.corpus.paths import Corpus
from pretrain_lib.data.windows.batches import Batch
from pretrain_lib.distributed.launched import on_main
from pretrain_lib.errors import LocalFault, is_of_disk, raised_here
from pretrain_lib.models.flops import has_data_sheet, model_flops
from pretrain_lib.models.interface import Model, unwrap
from pretrain_lib.optim.spikes import Limits, spike_limits
from pretrain_lib.run_folder.folder import read_status, write_status
from pretrain_lib.training.console_lines import format_step
from pretrain_lib.training.evaluation import estimate_left, evaluate_if_due, is_due
from pretrain_lib.training.measurements import peak_memory
from pretrain_lib.training.rollback import turn_back_or_go_on
from pretrain_lib.training.run import Run, open_batches, report_event, start_run
from pretrain_lib.training.step import StepResult, accumulate_gradients, apply_update
from pretrain_lib.training.summary import summary


def train(config: Recipe, model: Model, corpus: Corpus, accelerator: Accelerator) -> str:
    """Train `model` according to `config`, resuming from the newest checkpoint if there is one.

    Returns "done" at the end of the schedule or at `run.max_steps`, and "resumable" after a signal
    or when `run.max_time` is used up. A checkpoint is saved in each case; if that fails, the result
    is "resumable" too. It is the same on all ranks and is written to the run's `status.json`.
    """
    model = unwrap(model)
    config.check(processes=accelerator.num_processes)
    config = fit_to_text(config, corpus)
    run = start_run(config, model, corpus, accelerator)
    batches = open_batches(run)
    try:
        while True:
            step, is_new = run.state.step, not run.state.evaluated
            # A signal leaves what is due here to the next session: its end may come in seconds.
            if is_new and not (is_due(run, step) and run.watch.has_signal()):
                _evaluate(run)
            ended = step >= run.last_step and run.state.evaluated
            reason = run.watch.reason(evaluation_next=is_due(run, step + 1))
            if reason is not None and not ended:
                run.metrics.say(f"stopping after step {step:,}: {reason}")
            if is_new:
                _save(run, due=ended or reason is not None or step == run.continued_at)
            if ended or reason is not None:
                return _finish(run, None if ended else reason)
            started = time.monotonic()
            run.profiler.before(step + 1)
            result, limits = _step(run, next(batches))
            for line in run.profiler.after(step + 1):
                run.metrics.say(line)
            _record(run, result, seconds=time.monotonic() - started)
            if result.skipped and turn_back_or_go_on(run, result, limits):
                batches.close()
                batches = open_batches(run)  # continues after the data of the spike
    except Exception as error:
        _note_saved(run)  # let a save in progress finish: it is valid
        if isinstance(error, ValueError) and raised_here(error):
            raise LocalFault(str(error)) from error
        raise
    finally:
        batches.close()
        run.dataset.close()
        run.metrics.close()
        run.watch.close()


def _step(run: Run, micro_batches: list[Batch]) -> tuple[StepResult, Limits]:
    """Run one optimizer step; return its result and the spike limits that applied."""
    config, state, stability = run.config, run.state, run.config.stability
    limits = spike_limits(state.recent, sigma=stability.spike_sigma, window=stability.spike_window)
    accumulated = accumulate_gradients(
        run.accelerator, run.prepared_model, micro_batches, seed=config.run.seed, step=state.step
    )
    _note_saved(run)  # the update must not change tensors still being saved
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
    """Count a finished step; every `log.every` steps, write a metrics row for the interval."""
    state, config, length = run.state, run.config, run.config.batch.sequence_length
    windows, rate = config.batch_sizes().at(state.step), config.learning_rate()(state.step)
    tokens = windows * length
    state.count_step(windows=windows, tokens=tokens, seconds=seconds)
    run.time_left.note_step(windows=windows, seconds=seconds)
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
    speed, memory = state.row_tokens / state.row_seconds, peak_memory(run.accelerator.device)
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
        "peak_memory_bytes": memory.peak_bytes,
    }
    run.metrics.write(row)
    line = format_step(
        row,
        total_steps=run.last_step,
        memory=memory,
        left=estimate_left(run),
        shows_mfu=has_data_sheet(run.accelerator.device),
    )
    run.metrics.say(line)
    state.begin_row()


def _evaluate(run: Run) -> None:
    """Run the evaluations that are due; if one fails, save a checkpoint before raising."""
    try:
        evaluate_if_due(run)
        run.state.evaluated = True
    except Exception as error:
        # One rank of several cannot save alone, and a lost peer is no reason to, nor is a disk that
        # fails: the run goes on from its newest checkpoint and repeats the evaluation.
        if run.accelerator.num_processes == 1 and not is_of_disk(error):
            _save(run, due=True)
        raise


def _save(run: Run, *, due: bool) -> None:
    """Start saving a checkpoint if `due`, or if an interval has ended or what is kept is best."""
    state = run.state
    best = 0 < state.step == state.step_of_best(run.config.checkpoint.keep_best)
    is_regular = best or run.config.save_is_due(state.step, state.tokens)
    if not (due or is_regular):
        return
    if is_regular and run.config.stability.spike_action == "rollback":
        state.turn_back_to = state.step
    _note_saved(run)
    started = time.monotonic()
    if run.accelerator.is_main_process:
        run.metrics.sync()
        state.stream = run.dataset.cursor(state.windows)
    run.writer.start(state, run.model, run.optimizer)
    run.time_left.note_save_begun(time.monotonic() - started)


def _note_saved(run: Run) -> Saved | None:
    """Wait for the checkpoint being written, if any, and report the outcome."""
    saved = run.writer.wait()
    if saved is None:
        return None
    run.watch.longest_save = max(run.watch.longest_save, saved.seconds)
    run.time_left.note_saved(saved.seconds)
    if saved.error is None:
        if run.accelerator.is_main_process:
            write_status(run.folder, "running", step=saved.step)
        run.metrics.say(f"saved {saved.path} in {saved.seconds:.1f} s")
    else:
        report_event(run, "not_saved", f"the checkpoint could not be written: {saved.error}")
    return saved


def _finish(run: Run, stopped_by: str | None) -> str:
    """Report how the run ended, on the console and in `status.json`; return the state."""
    saved = _note_saved(run)
    failed = bool(saved and saved.error)
    failed = on_main(run.accelerator, lambda: failed)
    _leave_group(run)
    state = "resumable" if stopped_by or failed else "done"
    reason = stopped_by or f"step {run.last_step} is reached"
    if failed:
        reason += ", but its checkpoint could not be written: make room and start again"
    if run.accelerator.is_main_process:
        step = read_status(run.folder).get("step") if failed else run.state.step
        write_status(run.folder, state, step=step, reason=reason, is_over="signal " not in reason)
        for line in summary(run, state=state, reason=reason):
            run.metrics.say(line)
    return state


def _leave_group(run: Run) -> None:
    """Destroy the process group, after the DDP wrapper.

    Whichever object holds the last reference to a process group joins its threads. If that is DDP,
    the gloo threads may in turn be waiting for DDP, and the process hangs.
    """
    run.prepared_model = None
    run.accelerator.free_memory()
    run.metrics.end_trackers()
