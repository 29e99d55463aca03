"""One optimizer step over micro-batches and ranks; every target weighs the same. Floor 1."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from pretrain_lib.loss import IGNORED_TARGET


@dataclass(frozen=True)
class StepResult:
    """What a step did."""

    loss: float
    """Nats per target token, over all micro-batches and ranks."""
    grad_norm: float
    """Global norm of the gradient before clipping."""
    targets: int
    """Target tokens that counted, over all ranks."""
    skipped: bool
    """Whether the update was left out because the gradient was not finite."""


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[dict[str, torch.Tensor]],
    *,
    learning_rate: float,
    max_grad_norm: float,
    seed: int,
    step: int,
) -> StepResult:
    """Accumulate the gradient of this rank's micro-batches, clip it, update the parameters.

    `model(**micro_batch)` returns the summed loss and the number of targets. The loss is their sum
    over all micro-batches and ranks, divided by the global number of targets. Dropout depends on
    `(seed, step, micro-batch)`, so there is no random state to save.
    """
    targets = sum((batch["targets"] != IGNORED_TARGET).sum() for batch in micro_batches)
    targets = accelerator.reduce(targets, "sum")
    loss_sum = torch.zeros((), device=accelerator.device)
    accelerator.gradient_accumulation_steps = len(micro_batches)
    accelerator.step = 0
    for index, batch in enumerate(micro_batches):
        micro_batch = index * accelerator.num_processes + accelerator.process_index
        torch.manual_seed(_dropout_seed(seed, step, micro_batch))
        with accelerator.accumulate(model):
            loss, _ = model(**batch)
            # backward() divides by the micro-batches, and the ranks' gradients are averaged.
            scale = accelerator.num_processes * len(micro_batches) / targets
            accelerator.backward(loss * scale)
        loss_sum += loss.detach()
    assert accelerator.sync_gradients, "the last micro-batch must synchronise the gradients"
    grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
    _update(optimizer, learning_rate, skip=~torch.isfinite(grad_norm))
    loss_sum = accelerator.reduce(loss_sum, "sum")
    # The only wait for the device in a step, once all of it is queued.
    values = torch.stack([loss_sum / targets, torch.as_tensor(grad_norm), targets.float()])
    loss, norm, count = values.tolist()
    return StepResult(loss, norm, int(count), skipped=not math.isfinite(norm))


def _update(optimizer: torch.optim.Optimizer, learning_rate: float, *, skip: torch.Tensor) -> None:
    """Step the optimizer unless `skip`, a boolean on the device that is never read by the host."""
    inner = getattr(optimizer, "optimizer", optimizer)  # behind Accelerate's wrapper
    for group in inner.param_groups:
        group["lr"] = learning_rate
    if all(group.get("fused") for group in inner.param_groups):
        inner.grad_scale, inner.found_inf = None, skip.float()
        optimizer.step()
    elif not skip:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _dropout_seed(*parts: int) -> int:
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part) % 2**62
    return seed
