"""A whole run on the null GPU: its steps, evaluations and checkpoints, and what they ask of it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from null_gpu_counts import DEVICE_TO_HOST, CallLog, Calls

import pretrain_lib as pl
from pretrain_lib.data.prepare.prepare import Job, prepare
from pretrain_lib.evaluate import validation
from pretrain_lib.evaluate.local_tasks import write_local_tasks
from pretrain_lib.training import evaluation, loop

PARTS = {
    "steps": (loop, "_step"),
    "validation": (evaluation, "_validate"),
    "scores": (evaluation, "_score"),
    "samples": (evaluation, "_sample"),
}
LENGTH, MICRO_BATCH, LAYERS = 1024, 8, 2
SAVED_AT, STEPS = 3, 6  # of them the last in a second process
SIDE, MAIN = "side stream", "stream"


def prepare_text(folder: Path) -> None:
    """Make tokens, a tokenizer and tasks of the text of the package itself."""
    root = Path(pl.__file__).parent
    texts = [path.read_text(encoding="utf-8") for path in sorted(root.rglob("*.py"))]
    source = folder / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    job = Job(sources=(str(source),), train_tokenizer=2000, validation="hash:0.3")
    prepare(job, folder / "data", quiet=True)
    write_local_tasks(folder / "data", folder / "tasks", items=20)


def recipe_in(folder: Path, steps: int) -> pl.Recipe:
    """Return a recipe that uses everything, of a model of GPT-2's width."""
    tokens = 2 * MICRO_BATCH * LENGTH
    return pl.Recipe(
        model=pl.GPT2Config(num_layers=LAYERS, context_length=LENGTH, vocabulary_size=2000),
        data=pl.DataConfig(path=str(folder / "data"), document_masking=True),
        batch=pl.BatchConfig(tokens=tokens, micro_batch=MICRO_BATCH, sequence_length=LENGTH),
        optimizer=pl.OptimizerConfig(learning_rate=1e-4),
        schedule=pl.ScheduleConfig(tokens=tokens * STEPS, warmup_tokens=tokens),
        samples=pl.SampleConfig(
            prompts=["def "], per_prompt=2, tokens=16, every=2, temperature=0.0
        ),
        run=pl.RunConfig(dir=str(folder / "run"), max_steps=steps),
        system=pl.SystemConfig(compile=False),  # compiled steps are counted by the cases
        checkpoint=pl.CheckpointConfig(every=SAVED_AT),
        validation=pl.ValidationConfig(every=2, tokens=16 * LENGTH),
        scores=pl.ScoreConfig(
            tasks=["heldout_choice"], include_path=str(folder / "tasks"), every=2
        ),
    )


def count_run(folder: str, steps: int) -> dict[str, Any]:
    """Train up to a step, resuming where there is a checkpoint; return what each part asks for."""
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    without_targets_of_its_own()
    log, found = CallLog(), {name: [] for name in PARTS}
    for name, (module, function) in PARTS.items():
        setattr(module, function, counted(getattr(module, function), log, found[name]))
    config = recipe_in(Path(folder), steps)
    corpus = pl.open_corpus(config)
    accelerator = pl.start_accelerator(config)
    with torch.device("meta"):
        model = pl.GPT2(config.model)
    outcome = pl.train(config, model, corpus, accelerator)
    return {"outcome": outcome} | {
        name: [summary(calls) for calls in each] for name, each in found.items()
    }


def counted(function: Callable, log: CallLog, found: list[Calls]) -> Callable:
    """Return a function that also keeps the calls made within it."""

    def wrapped(*args: Any, **options: Any) -> Any:
        log.take()
        result = function(*args, **options)
        found.append(log.take())
        return result

    return wrapped


def without_targets_of_its_own() -> None:
    """Let a validation divide by one where the null GPU has counted no targets."""
    result = validation._result

    def of_one_at_least(loss_sum: float, targets: float, *rest: Any) -> Any:
        return result(loss_sum, max(targets, 1), *rest)

    validation._result = of_one_at_least


def summary(calls: Calls) -> dict[str, Any]:
    """Return the figures of a part of a run."""
    to_host = {where: n for (where, kind), n in calls.copied.items() if kind == DEVICE_TO_HOST}
    return {
        "kernels": calls.launches,
        "waits": dict(calls.waits),
        "refused": dict(calls.refused),
        "products": dict(calls.products),
        "product_flops": calls.product_flops,
        "to_host": to_host.get(MAIN, 0),
        "to_host_beside": to_host.get(SIDE, 0),
    }
