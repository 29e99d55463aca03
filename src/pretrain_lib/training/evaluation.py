"""Evaluation during training: validation loss, lm-eval scores and samples."""

import json
import math
import os
import time
from operator import itemgetter

from accelerate.utils import gather_object

from pretrain_lib.distributed.launched import on_main
from pretrain_lib.distributed.sharding import whole_weights
from pretrain_lib.evaluate.harness import evaluate_model
from pretrain_lib.evaluate.results import (
    find_score,
    format_line,
    iterate_scores,
    write_results,
)
from pretrain_lib.evaluate.validation import validate
from pretrain_lib.measures import VALIDATION_LOSS
from pretrain_lib.models.generation import sample_texts
from pretrain_lib.quiet import without_foreign_progress
from pretrain_lib.run_folder.folder import SAMPLES, SCORES
from pretrain_lib.training.compilation import run_eagerly
from pretrain_lib.training.console_lines import fill, format_sample
from pretrain_lib.training.measurements import (
    SAMPLING,
    SCORING,
    VALIDATION,
    Left,
    events_ahead,
)
from pretrain_lib.training.run import Run


def is_due(run: Run, step: int) -> bool:
    """Return whether any evaluation is due after `step` steps."""
    return any(due(run, step) for due in (_validation_is_due, _scores_are_due, _samples_are_due))


def evaluate_if_due(run: Run) -> None:
    """Validate, score and write samples at the intervals of the recipe, and at the last step."""
    if not is_due(run, run.state.step):
        return
    started = time.monotonic()
    # Eager, because every new input shape would trigger a compilation.
    with run_eagerly(), whole_weights(run.model, run.accelerator):
        for kind, due, evaluate in (
            (VALIDATION, _validation_is_due, _validate),
            (SCORING, _scores_are_due, _score),
            (SAMPLING, _samples_are_due, _sample),
        ):
            if due(run, run.state.step):
                begun = time.monotonic()
                evaluate(run)
                run.time_left.note_evaluation(kind, time.monotonic() - begun)
    run.watch.longest_evaluation = max(run.watch.longest_evaluation, time.monotonic() - started)


def _validation_is_due(run: Run, step: int) -> bool:
    due = step % run.config.validation.every == 0 or step >= run.last_step
    return bool(run.stretches) and due


def _scores_are_due(run: Run, step: int) -> bool:
    scores = run.config.scores
    return bool(scores.tasks) and (step % scores.every == 0 or step >= run.last_step)


def _samples_are_due(run: Run, step: int) -> bool:
    samples = run.config.samples
    return _writes_samples(run) and (samples.is_due(step) or step >= run.last_step)


def _writes_samples(run: Run) -> bool:
    return bool(run.config.samples.prompts) and run.corpus.tokenizer is not None


def estimate_left(run: Run) -> Left | None:
    """Estimate the time that the run still takes, before the evaluations of its current step."""
    step, sizes = run.state.step, run.config.batch_sizes()
    ahead = events_ahead(
        run.config,
        step=step,
        validates=bool(run.stretches),
        scores=bool(run.config.scores.tasks),
        samples=_writes_samples(run),
    )
    windows = sizes.before(run.last_step) - sizes.before(step)
    return run.time_left.estimate(windows=windows, ahead=ahead)


def _validate(run: Run) -> None:
    config, state = run.config, run.state
    result = validate(
        run.accelerator,
        run.model,
        run.stretches,
        micro_batch=config.batch.micro_batch,
        document_masking=config.data.document_masking,
    )
    if state.validated not in (None, run.validated):
        state.best_loss = None  # of another text
    state.validated = run.validated
    row = {"kind": "validation", "step": state.step, "tokens": state.tokens}
    run.metrics.write(row | result.to_row())
    if _is_better(result.loss, state.best_loss, higher=False):
        state.best_loss, state.best_step = result.loss, state.step
    run.metrics.say(fill(f"validation at step {state.step:,}: {result.format()}"))


def _score(run: Run) -> None:
    """Score the current model, and note whether what `checkpoint.keep_best` names is the best."""
    results, state, metric = _score_together(run), run.state, run.config.checkpoint.keep_best
    if metric is None or metric == VALIDATION_LOSS:
        return
    value, higher = on_main(run.accelerator, lambda: find_score(results, metric))
    best, _ = state.best_scores.get(metric, (None, 0))
    if _is_better(value, best, higher=higher):
        state.best_scores = {metric: [value, state.step]}


def _is_better(value: float, best: float | None, *, higher: bool) -> bool:
    """Return whether a value is the best so far; what is not finite is none."""
    if best is None or not math.isfinite(best):
        return math.isfinite(value)
    return math.isfinite(value) and (value > best if higher else value < best)


def _score_together(run: Run) -> dict:
    """Run lm-eval on all processes; return its results on the main process, {} elsewhere."""
    # Imported here, so that lm-eval is required only for runs that use it.
    from pretrain_lib.evaluate.all_ranks import follow, lead
    from pretrain_lib.evaluate.live_model import LiveModel, transformers_tokenizer

    scores, state, tokenizer = run.config.scores, run.state, run.corpus.tokenizer
    if not run.accelerator.is_main_process:
        hf_tokenizer = transformers_tokenizer(tokenizer)
        follow(run.accelerator, LiveModel(run.model, hf_tokenizer, batch_size=scores.batch_size))
        return {}
    started = time.monotonic()
    with lead(run.accelerator) as deal, without_foreign_progress():
        results = evaluate_model(
            run.model,
            tokenizer,
            run.tasks,
            deal=deal,
            limit=scores.limit,
            batch_size=scores.batch_size,
        )
    write_results(results, run.folder / SCORES / f"step-{state.step:08d}.json")
    row = {"kind": "evaluation", "step": state.step, "tokens": state.tokens}
    for task, metric, value, error in iterate_scores(results):
        stderr = error if isinstance(error, float) else None  # it is "N/A" for a single item
        row |= {f"{task}/{metric}": value, f"{task}/{metric}_stderr": stderr}
    run.metrics.write(row)
    seconds = time.monotonic() - started
    text = f"scores at step {state.step:,}, in {seconds:.1f} s: {format_line(results)}"
    run.metrics.say(fill(text))
    return results


def _sample(run: Run) -> None:
    """Generate samples, distributed over the processes; the world size does not affect them."""
    settings, accelerator = run.config.samples, run.accelerator
    process, processes = accelerator.process_index, accelerator.num_processes
    with accelerator.autocast():
        texts = sample_texts(
            run.model,
            run.corpus.tokenizer,
            settings.prompts,
            per_prompt=settings.per_prompt,
            new_tokens=settings.tokens,
            context_length=run.model.config.context_length,
            seed=run.config.run.seed,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            rows=slice(process, None, processes),
        )
    numbered = [(process + i * processes, sample) for i, sample in enumerate(texts)]
    samples = [sample for _, sample in sorted(gather_object(numbered), key=itemgetter(0))]
    if accelerator.is_main_process:
        with (run.folder / SAMPLES).open("a", encoding="utf-8") as file:
            rows = (json.dumps({"step": run.state.step, **sample}) for sample in samples)
            file.writelines(f"{row}\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())  # as the metrics: no later checkpoint may outlive them
        for sample in samples:
            run.metrics.say(format_sample(sample, step=run.state.step))
