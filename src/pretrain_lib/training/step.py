"""One optimizer step over micro-batches and ranks; every target weighs the same."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from pretrain_lib.data.windows.packing import IGNORED_TARGET
from pretrain_lib.tensors.pieces import whole_tensor


@dataclass(frozen=True)
class Accumulated:
    """What the micro-batches of a step came to; their gradient is in the parameters."""

    loss_sum: torch.Tensor
    """Nats over all targets of this rank, ()."""
    targets: torch.Tensor
    """Target tokens that count, over all ranks, ()."""


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
    """Whether the update was left out: not finite, or above a limit."""


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
    """Accumulate the gradient of this rank's micro-batches, clip it, update the parameters."""
    accumulated = accumulate_gradients(accelerator, model, micro_batches, seed=seed, step=step)
    options = {"learning_rate": learning_rate, "max_grad_norm": max_grad_norm}
    return apply_update(accelerator, model, optimizer, accumulated, **options)


def accumulate_gradients(
    accelerator: Accelerator,
    model: nn.Module,
    micro_batches: Sequence[dict[str, torch.Tensor]],
    *,
    seed: int,
    step: int,
) -> Accumulated:
    """Run forward and backward of this rank's micro-batches; the parameters stay as they are.

    `model(**micro_batch)` returns the summed loss and the number of targets. The gradient is that
    of their sum over all micro-batches and ranks, divided by the global number of targets. Dropout
    depends on `(seed, step, micro-batch)`, so there is no random state to save.
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
            with accelerator.autocast():  # what FSDP2 has prepared does not do it by itself
                loss, _ = model(**batch)
            # backward() divides by the micro-batches, and the ranks' gradients are averaged.
            scale = accelerator.num_processes * len(micro_batches) / targets
            accelerator.backward(loss * scale)
        loss_sum += loss.detach()
    assert accelerator.sync_gradients, "the last micro-batch must synchronise the gradients"
    return Accumulated(loss_sum, targets)


def apply_update(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    accumulated: Accumulated,
    *,
    learning_rate: float,
    max_grad_norm: float,
    loss_limit: float = math.inf,
    norm_limit: float = math.inf,
) -> StepResult:
    """Clip the accumulated gradient and step the optimizer, on all ranks alike.

    The update is left out, and the gradient dropped, if loss or gradient norm (before clipping) is
    not finite or above its limit.
    """
    grad_norm = whole_tensor(accelerator.clip_grad_norm_(model.parameters(), max_grad_norm))
    loss = accelerator.reduce(accumulated.loss_sum, "sum") / accumulated.targets
    finite = torch.isfinite(grad_norm) & torch.isfinite(loss)
    skip = ~finite | (loss > loss_limit) | (grad_norm > norm_limit)
    _update(optimizer, learning_rate, skip=skip)
    # The only wait for the device in a step, once all of it is queued.
    values = torch.stack([loss, grad_norm, accumulated.targets.float(), skip.float()])
    loss, norm, count, skipped = values.tolist()
    return StepResult(loss, norm, int(count), skipped=bool(skipped))


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
