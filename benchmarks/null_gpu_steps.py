"""What runs on the null GPU: steps of training and what they ask of CUDA."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from null_gpu_cases import Case
from null_gpu_counts import BytesMoved, CallLog, Calls, CompiledLaunches
from torch._dynamo.utils import counters

from pretrain_lib.config.settings import (
    BatchConfig,
    OptimizerConfig,
    Recipe,
    SystemConfig,
)
from pretrain_lib.data.windows.document_ends import narrow_document_ends
from pretrain_lib.distributed.engine import start_accelerator
from pretrain_lib.models.gpt2 import GPT2, GPT2Config
from pretrain_lib.models.llama import Llama, LlamaConfig
from pretrain_lib.plan.memory import estimate_memory
from pretrain_lib.plan.step import Step
from pretrain_lib.training.placement import place
from pretrain_lib.training.step import train_step

FAMILIES = {"gpt2": (GPT2, GPT2Config), "llama": (Llama, LlamaConfig)}
WARM_UP = 3  # steps, after which nothing is compiled any more
COUNTED = 2
TOP = 5  # kernels that are named
SHORTEST = 16  # tokens of a document
RATE = 1e-4
NAMES = ("input_ids", "targets")


def recipe_of(case: Case) -> Recipe:
    """Return the recipe of which the steps of a case are made."""
    windows = case.batch * case.micro_batches
    return Recipe(
        model=FAMILIES[case.family][1](**case.shape),
        batch=BatchConfig(
            tokens=windows * case.length, micro_batch=case.batch, sequence_length=case.length
        ),
        optimizer=OptimizerConfig(
            kind=case.optimizer, learning_rate=RATE, moments=case.moments, betas=(0.9, 0.95)
        ),
        system=SystemConfig(compile=case.compiled, activation_checkpointing=case.checkpointing),
    )


def planned_bytes(case: Case) -> int:
    """Return the peak that `--plan` names."""
    step = Step(
        sequences=case.batch,
        length=case.length,
        micro_batches=case.micro_batches,
        activation_checkpointing=case.checkpointing,
        moments=case.moments,
        muon=case.optimizer == "muon",
        compiled=case.compiled,
    )
    with torch.device("meta"):
        model = FAMILIES[case.family][0](recipe_of(case).model)
    return estimate_memory(model, step).peak


def count_steps(case: Case) -> dict[str, Any]:
    """Make the steps of a case, and return what the last of them asked of CUDA."""
    accelerator, model, optimizer = build(recipe_of(case))
    log = CallLog()
    step = make_stepper(case, accelerator, model, optimizer)
    refused = sum((step_calls(step, n, log).refused for n in range(WARM_UP)), start=Calls().refused)
    compiled = counters["stats"]["unique_graphs"]
    torch.cuda.reset_peak_memory_stats()
    for number in range(WARM_UP, WARM_UP + COUNTED):
        calls = step_calls(step, number, log)
        refused += calls.refused
    peak = torch.cuda.max_memory_allocated()
    recompiled = counters["stats"]["unique_graphs"] - compiled
    moved = moved_by(lambda: step(WARM_UP + COUNTED))
    return {
        "refused": dict(refused),
        "waits": dict(calls.waits),
        "recompiled": recompiled,
        "kernels": calls.launches,
        "products": dict(calls.products),
        "product_flops": calls.product_flops,
        "most_launched": dict(calls.kernels.most_common(TOP)),
        "attention_blocks": attention_blocks(calls),
        "peak": peak,
        "planned": planned_bytes(case),
        "moved": moved.total(),
        "moved_most": dict(moved.most_common(TOP)),
    }


def build(recipe: Recipe) -> tuple[Accelerator, torch.nn.Module, torch.optim.Optimizer]:
    """Return what `start_run` makes of a recipe, its weights anything."""
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    accelerator = start_accelerator(recipe)
    model_type = GPT2 if isinstance(recipe.model, GPT2Config) else Llama
    with torch.device("meta"):
        model = model_type(recipe.model)
    model.to_empty(device=accelerator.device)
    return accelerator, *place(recipe, model, accelerator)


def make_stepper(
    case: Case, accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> Callable[[int], None]:
    """Return a function that makes the step of a number."""

    def step(number: int) -> None:
        options = {"learning_rate": RATE, "max_grad_norm": 1.0, "seed": 0, "step": number}
        train_step(accelerator, model, optimizer, list(batches(case, number)), **options)

    return step


def batches(case: Case, number: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the micro-batches of a step; the documents of each are of other lengths."""
    rows, length = case.batch, case.length
    for index in range(case.micro_batches):
        batch = {name: torch.zeros(rows, length, dtype=torch.int64) for name in NAMES}
        if case.documents:
            seed = number * case.micro_batches + index
            batch["document_ends"] = document_ends(rows, length, seed)
        batch = narrow_document_ends(batch)
        yield {name: tensor.cuda(non_blocking=True) for name, tensor in batch.items()}


def document_ends(rows: int, length: int, seed: int) -> torch.Tensor:
    """Return ends (B, T) of documents whose mean length doubles from seed to seed, 16 to T."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [SHORTEST << n for n in range((length // SHORTEST).bit_length())]
    mean = lengths[seed % len(lengths)]
    ends = torch.full((rows, length), length, dtype=torch.int32)
    for row in ends:
        count = length // mean
        cuts = torch.randperm(length - 1, generator=generator)[: count - 1].sort().values + 1
        row[: count - 1] = cuts.to(torch.int32)
    return ends


def step_calls(step: Callable[[int], None], number: int, log: CallLog) -> Calls:
    """Make a step and return its calls; the batch is made within it."""
    log.take()
    step(number)
    return log.take()


def attention_blocks(calls: Calls) -> int:
    """Return the blocks of all launches of attention's kernels."""
    return sum(blocks for name, blocks in calls.grids.items() if "flash" in name)


def moved_by(action: Callable[[], None]) -> Any:
    """Return the bytes that kernels move, by kernel, products and attention left out."""
    moved = BytesMoved()
    with moved, CompiledLaunches(moved):
        action()
    return moved.by_kernel
