"""Handle skipped updates: continue, roll back to a checkpoint, or stop the run."""

import math

from pretrain_lib.checkpoint.folders import find_newest, prune, step_of
from pretrain_lib.checkpoint.state import load_checkpoint, read_state
from pretrain_lib.distributed.launched import on_main
from pretrain_lib.optim.spikes import Limits, describe_skip
from pretrain_lib.run_folder.cut import drop_rows_after
from pretrain_lib.run_folder.folder import CHECKPOINTS, SAMPLES, write_status
from pretrain_lib.training.run import Run, report_event, write_event
from pretrain_lib.training.step import StepResult
from pretrain_lib.wording import plural

MAX_ROLLBACKS = 3  # to the same checkpoint; beyond that, the data is not the cause


def turn_back_or_go_on(run: Run, result: StepResult, limits: Limits) -> bool:
    """Record a skipped update; return whether the run was rolled back to a checkpoint.

    Raises FloatingPointError after `stability.max_skipped` skipped updates in a row, or after
    `MAX_ROLLBACKS` rollbacks to the same checkpoint.
    """
    state, settings = run.state, run.config.stability
    state.skipped += 1
    state.skipped_in_a_row += 1
    reason = describe_skip(result.loss, result.grad_norm, limits)
    finite = math.isfinite(result.loss) and math.isfinite(result.grad_norm)
    if settings.spike_action == "rollback" and finite and _roll_back(run, reason):
        return True
    report_event(
        run, "skipped", f"{reason}: update left out", loss=result.loss, grad_norm=result.grad_norm
    )
    if (number := state.skipped_in_a_row) >= settings.max_skipped:
        there_is = on_main(run.accelerator, lambda: find_newest(run.folder / CHECKPOINTS))
        resume = "resume from a checkpoint before it" if there_is else "start anew: there is none"
        updates = f"{plural(number, 'update')} in a row {'was' if number == 1 else 'were'}"
        raise FloatingPointError(
            f"{updates} left out, up to step {state.step} ({reason}): lower "
            f"optimizer.learning_rate or lengthen schedule.warmup_tokens, and {resume}"
        )
    return False


def _roll_back(run: Run, reason: str) -> bool:
    """Load a checkpoint, and continue with the data after that of the current step.

    It is the newest that the settings made. Those of a stop do not count: a run that was not
    stopped has none. Returns False if there is no checkpoint yet.
    """
    spike, folder = run.state, run.folder / CHECKPOINTS
    path = on_main(
        run.accelerator,
        lambda: find_newest(folder, accept=lambda path: step_of(path) <= spike.turn_back_to),
    )
    if path is None:
        return False
    state, _ = read_state(path)
    before = [r for r in spike.rollbacks if r["to_step"] == state.step]
    if len(before) >= MAX_ROLLBACKS:
        raise FloatingPointError(
            f"{len(before)} times the run went back to step {state.step} and met a spike again "
            f"({reason}): lower optimizer.learning_rate, and resume from an earlier checkpoint"
        )
    load_checkpoint(path, run.model, run.optimizer)
    left_out = {"from_step": spike.step, "to_step": state.step}
    left_out |= {"first_window": state.windows, "windows": spike.windows - state.windows}
    text = (
        f"{reason}: back from step {spike.step:,} to {path.name}, "
        f"{plural(left_out['windows'], 'window')}"
    )
    left_out["message"] = f"{text} of the data are left out"
    state.rollbacks = [*spike.rollbacks, left_out]
    state.windows, state.seconds, state.evaluated = spike.windows, spike.seconds, True
    run.state, run.continued_at = state, state.step
    run.metrics.rewind(state.step)
    if run.accelerator.is_main_process:
        drop_rows_after(run.folder / SAMPLES, state.step)
        prune(folder, path, keep_last=0, keep_every=None)  # what was saved later, at a stop
        write_status(run.folder, "running", step=state.step)
    # The events get the step after the checkpoint's. A run that resumes from the checkpoint then
    # drops them, and reports a repeated rollback only once. The rewind above has dropped those of
    # earlier rollbacks to this checkpoint, so they are written again.
    for earlier in before:
        write_event(run, "rollback", step=state.step + 1, **earlier)
    report_event(run, "rollback", step=state.step + 1, **left_out)
    return True
