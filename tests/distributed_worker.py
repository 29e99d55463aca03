"""What each process of test_distributed.py does: train by the step, and say what came of it.

    torchrun --nproc_per_node W tests/distributed_worker.py OUT CASE...

A case is MODEL-WAY-PRECISION[-OPTION...]: gpt2-fsdp-no, llama-ddp-bf16-full, hf.olmo2-fsdp-no (a
family of transformers, for fewer steps). The batches are the same for any number of processes:
micro-batch m of a step goes to process m mod W.
"""

import gc
import json
import os
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from pretrain_lib import (
    GPT2,
    IGNORED_TARGET,
    BatchConfig,
    GPT2Config,
    Llama,
    LlamaConfig,
    Recipe,
    SystemConfig,
    build_adamw,
    build_model,
    build_muon,
)
from pretrain_lib.distributed import engine as engine_module
from pretrain_lib.distributed.sharding import is_sharded, shard_by_block, share_weights
from pretrain_lib.tensors.pieces import whole_tensor
from pretrain_lib.training.compilation import set_up_model
from pretrain_lib.training.step import train_step
from tests.compilation import without_code_generation
from tests.families import family
from tests.fsdp_on_cpu import sharding_accelerator

STEPS, MICRO_BATCHES, LENGTH, VOCABULARY = 20, 4, 16, 61
FAMILY_STEPS, TIMEOUT_SECONDS = 3, 1234.0
SHAPE = {"vocabulary_size": VOCABULARY, "context_length": LENGTH, "num_layers": 2, "num_heads": 2}
MODELS = {
    "gpt2": lambda: GPT2(GPT2Config(**SHAPE, width=32)),
    "llama": lambda: Llama(LlamaConfig(**SHAPE, width=32, num_key_value_heads=1, mlp_width=48)),
    "qwen3": lambda: Llama(
        LlamaConfig(**SHAPE, width=32, num_key_value_heads=1, mlp_width=48, qk_norm=True)
    ),
    # Of the two rows of its key and value projections, a third process holds none.
    "narrow": lambda: Llama(LlamaConfig(**SHAPE, width=4, num_key_value_heads=1, mlp_width=7)),
}
COLLECTIVES = {
    "c10d::allreduce_": "all_reduce",
    "c10d::alltoall_base_": "all_to_all",
    "gloo:all_gather": "all_gather",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
}
PLAIN_ACCELERATOR = engine_module.Accelerator


def build(name):
    """Return a model of a case, without weights."""
    prefix, _, rest = name.partition(".")
    return build_model(family(rest)) if prefix == "hf" else MODELS[name]()


def micro_batches(step):
    """Return the micro-batches of a step, of 2 sequences each; from none to all but one ignored."""
    generator = torch.Generator().manual_seed(step)
    batches = []
    for number in range(MICRO_BATCHES):
        ids = torch.randint(VOCABULARY, (2, LENGTH + 1), generator=generator)
        targets = ids[:, 1:].clone()
        ignored = (step + number) % 4 * 10  # of 32
        places = torch.randperm(targets.numel(), generator=generator)[:ignored]
        targets.view(-1)[places] = IGNORED_TARGET
        batches.append({"input_ids": ids[:, :-1], "targets": targets})
    return batches


def own_micro_batches(step, *, rank, world):
    """Return the micro-batches of a process, as many on each: some may be all ignored."""
    dealt = micro_batches(step)
    idle = dealt[0] | {"targets": torch.full_like(dealt[0]["targets"], IGNORED_TARGET)}
    dealt += [idle] * (-MICRO_BATCHES % world)
    return dealt[rank::world]


def recipe_of(model, **options):
    """Return a recipe of which all but the model and how the machine is used is small."""
    batch = {"tokens": MICRO_BATCHES * 2 * LENGTH, "micro_batch": 2, "sequence_length": LENGTH}
    return Recipe(
        model=model,
        batch=BatchConfig(**batch),
        system=SystemConfig(**options),
    )


def start(way, precision, options):
    """Return the Accelerator of a case, as the library starts it."""
    sharded = way != "ddp"
    shards = {"fsdp": os.environ["WORLD_SIZE"], "hsdp": "2"}
    os.environ["SHARD_SIZE"] = shards.get(way, "1")
    os.environ["ACCELERATE_MIXED_PRECISION"] = precision
    os.environ["ACCELERATE_USE_FSDP"] = str(sharded).lower()
    os.environ["FSDP_VERSION"] = "2"
    engine_module.Accelerator = sharding_accelerator if sharded else PLAIN_ACCELERATOR
    engine_module._speed_in_bf16 = lambda cpu: ("this CPU", True)  # as asked for, also if slow
    dtype = "bf16" if "gather" in options else "fp32"
    options = {"fsdp_param_dtype": dtype, "collective_timeout": TIMEOUT_SECONDS}
    config = recipe_of(GPT2Config(**SHAPE, width=32), **options)
    return engine_module.start_accelerator(config)


def groups_of(accelerator):
    """Return the process groups in which the processes of a case wait for one another."""
    if not torch.distributed.is_initialized():
        return []
    mesh = accelerator.torch_device_mesh
    own = [] if mesh is None else [mesh.get_group(name) for name in mesh.mesh_dim_names]
    return [torch.distributed.group.WORLD, *own]


def timeout_of(group):
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def run_case(case, out):
    """Train a case and write its losses, collectives and final weights (on the main process)."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    name, way, precision, *options = case.split("-")
    accelerator = start(way, precision, options)
    # Processes that disagree about the beginning must not disagree about the run.
    model = build(name).initialize(accelerator.process_index if "share" in options else 0)
    without_code_generation()
    recompute = next((o for o in options if o in ("selective", "full")), "none")
    set_up_model(model, compiled="compile" in options, activation_checkpointing=recompute)
    if is_sharded(accelerator):
        share_weights(model, accelerator)
        shard_by_block(model, accelerator)
    make = build_muon if "muon" in options else build_adamw
    moments = "bf16" if "moments" in options else "fp32"
    optimizer = make(model, learning_rate=1e-3, moments=moments)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    rank, world = accelerator.process_index, accelerator.num_processes
    losses, norms, counts = [], [], Counter()
    steps = FAMILY_STEPS if name.startswith("hf.") else STEPS
    for step in range(steps):
        own = own_micro_batches(step, rank=rank, world=world)
        arguments = accelerator, prepared, optimizer, own
        rest = {"learning_rate": 1e-3, "max_grad_norm": 1.0, "seed": 0, "step": step}
        if step < steps - 1:
            result = train_step(*arguments, **rest)
        else:  # in which it is counted what the processes say to one another
            is_main = accelerator.is_main_process
            counting = profile(activities=[ProfilerActivity.CPU]) if is_main else nullcontext()
            with counting as profiler:
                result = train_step(*arguments, **rest)
            if is_main:
                names = (COLLECTIVES.get(event.name) for event in profiler.events())
                counts.update(name for name in names if name)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    weights = {n: whole_tensor(p.detach()).clone() for n, p in model.named_parameters()}
    if accelerator.is_main_process:
        save_file(weights, out / f"{case}.safetensors")
        pieces = sum(isinstance(p, DTensor) for p in model.parameters())
        record = {"losses": losses, "norms": norms, "collectives": counts, "pieces": pieces}
        record["timeouts"] = [timeout_of(group) for group in groups_of(accelerator)]
        (out / f"{case}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    torch.manual_seed(0)
    for chosen in sys.argv[2:]:
        run_case(chosen, Path(sys.argv[1]))
    if torch.distributed.is_initialized():
        gc.collect()  # DDP must not outlive its group, or gloo may hang
        torch.distributed.destroy_process_group()
