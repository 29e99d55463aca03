"""What a run looks at while it trains: validation loss and samples. Floor 10."""

import dataclasses
import time

from pretrain_lib.evaluate.validation import validate
from pretrain_lib.generation import write_samples
from pretrain_lib.run import Run
from pretrain_lib.run_folder import SAMPLES
from pretrain_lib.sharding import whole_weights
from pretrain_lib.speed import run_eagerly


def is_due(run: Run, step: int) -> bool:
    """Return whether there will be something to look at after so many steps."""
    return _validation_is_due(run, step) or _samples_are_due(run, step)


def evaluate_if_due(run: Run) -> None:
    """Validate and write samples at the steps that the recipe names, and at the last one."""
    if not is_due(run, run.state.step):
        return
    started = time.monotonic()
    # Their shapes would be compiled one by one.
    with run_eagerly(), whole_weights(run.model, run.accelerator):
        if _validation_is_due(run, run.state.step):
            _validate(run)
        if _samples_are_due(run, run.state.step):
            _sample(run)
    run.watch.longest_evaluation = max(run.watch.longest_evaluation, time.monotonic() - started)


def _validation_is_due(run: Run, step: int) -> bool:
    due = step % run.config.run.evaluate_every == 0 or step >= run.last_step
    return run.corpus.validation is not None and due


def _samples_are_due(run: Run, step: int) -> bool:
    samples = run.config.samples
    wanted = samples.prompts and run.corpus.tokenizer is not None
    return bool(wanted) and ((step and step % samples.every == 0) or step >= run.last_step)


def _validate(run: Run) -> None:
    config, state = run.config, run.state
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
    row = {"kind": "validation", "step": state.step, "tokens": state.tokens}
    run.metrics.write(row | dataclasses.asdict(result))
    if state.best_loss is None or result.loss < state.best_loss:
        state.best_loss, state.best_step = result.loss, state.step
    run.metrics.say(f"validation at step {state.step:,}: {result.format()}")


def _sample(run: Run) -> None:
    if run.accelerator.is_main_process:
        texts = write_samples(
            run.folder / SAMPLES,
            run.model,
            run.corpus.tokenizer,
            run.config.samples,
            step=run.state.step,
            seed=run.config.run.seed,
        )
        for text in texts:
            run.metrics.say(f"sample at step {run.state.step:,}: {text!r}")
