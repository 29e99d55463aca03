"""One optimizer step over micro-batches and ranks, in which every target has the same weight."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from pretrain_lib.optim.state import skips_on_device, unwrapped
from pretrain_lib.tensors.pieces import whole_tensor
from pretrain_lib.training.micro_batches import count_targets
from pretrain_lib.values import check_value


@dataclass(frozen=True)
class Accumulated:
    """The totals of a step's micro-batches, whose gradient has been accumulated in `.grad`."""

    loss_sum: torch.Tensor
    """Loss in nats, summed over all targets of this rank; shape ()."""
    targets: torch.Tensor
    """Number of targets that are not ignored, over all ranks; shape ()."""


@dataclass(frozen=True)
class StepResult:
    """The result of an optimizer step."""

    loss: float
    """Mean loss in nats per target token, over all micro-batches and ranks."""
    grad_norm: float
    """Global norm of the gradient, before clipping."""
    targets: int
    """Number of targets that are not ignored, over all ranks."""
    skipped: bool
    """Whether the update was skipped: loss or gradient norm not finite, or above its limit."""


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Iterable[dict[str, torch.Tensor]],
    *,
    learning_rate: float,
    max_grad_norm: float,
    seed: int,
    step: int,
) -> StepResult:
    """Accumulate the gradient over this rank's micro-batches, clip it, update the parameters.

    `model` is any module of which `model(**micro_batch)` returns `(summed loss, number of
    targets)`, as GPT2, Llama and CausalLMAdapter do; the loss must not be a mean. A micro-batch
    holds `targets`, in which IGNORED_TARGET is not counted, and what else the model takes.
    """
    check_value(learning_rate, "learning_rate", float, minimum=0)
    if max_grad_norm != math.inf:  # which clips nothing
        check_value(max_grad_norm, "max_grad_norm", float, above=0)
    accumulated = accumulate_gradients(accelerator, model, micro_batches, seed=seed, step=step)
    return apply_update(
        accelerator,
        model,
        optimizer,
        accumulated,
        learning_rate=learning_rate,
        max_grad_norm=max_grad_norm,
    )


def accumulate_gradients(
    accelerator: Accelerator,
    model: nn.Module,
    micro_batches: Iterable[dict[str, torch.Tensor]],
    *,
    seed: int,
    step: int,
) -> Accumulated:
    """Run forward and backward over this rank's micro-batches, without updating the parameters.

    The gradient is that of the loss summed over all ranks, divided by their number of targets. The
    dropout seed is derived from `(seed, step, micro-batch)`, so no random state needs saving.
    """
    micro_batches, targets = count_targets(accelerator, micro_batches)
    loss_sum = torch.zeros((), device=accelerator.device)
    accelerator.gradient_accumulation_steps = len(micro_batches)
    accelerator.step = 0
    for index, batch in enumerate(micro_batches):
        micro_batch = index * accelerator.num_processes + accelerator.process_index
        torch.manual_seed(_dropout_seed(seed, step, micro_batch))
        with accelerator.accumulate(model):
            with accelerator.autocast():  # Accelerate does not apply it to a model sharded by FSDP2
                loss = _loss_of(model(**batch))
            # backward() divides by the number of micro-batches, DDP and FSDP2 by that of ranks: the
            # weight of a target is to be 1 / targets.
            scale = accelerator.num_processes * len(micro_batches) / targets
            accelerator.backward(loss * scale)
        loss_sum += loss.detach()
    assert accelerator.sync_gradients, "the last micro-batch must synchronise the gradients"
    return Accumulated(loss_sum, targets)


def _loss_of(output: object) -> torch.Tensor:
    """Return the summed loss that a model has returned with the number of targets."""
    if isinstance(output, tuple | list) and len(output) == 2:
        loss, targets = output
        if isinstance(loss, torch.Tensor) and loss.shape == getattr(targets, "shape", ()) == ():
            return loss
    raise ValueError(
        f"model(**micro_batch) must return (summed loss, number of targets), not "
        f"{type(output).__name__}; wrap a model of transformers in CausalLMAdapter"
    )


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
    """Clip the accumulated gradient and step the optimizer, identically on all ranks.

    The update is skipped, and the gradient discarded, if the loss or the gradient norm (before
    clipping) is not finite or exceeds its limit.
    """
    grad_norm = whole_tensor(accelerator.clip_grad_norm_(model.parameters(), max_grad_norm))
    loss = accelerator.reduce(accumulated.loss_sum, "sum") / accumulated.targets
    finite = torch.isfinite(grad_norm) & torch.isfinite(loss)
    skip = ~finite | (loss > loss_limit) | (grad_norm > norm_limit)
    _update(optimizer, learning_rate, skip=skip)
    # MPS has no fp64; in fp32, counts of targets above 2^24 are rounded.
    dtype = torch.float32 if loss.device.type == "mps" else torch.float64
    values = torch.stack([x.to(dtype) for x in (loss, grad_norm, accumulated.targets, skip)])
    # The only host-device synchronization of a step, after all its work has been queued.
    loss, norm, targets, skipped = values.tolist()
    return StepResult(loss, norm, int(targets), skipped=bool(skipped))


def _update(optimizer: torch.optim.Optimizer, learning_rate: float, *, skip: torch.Tensor) -> None:
    """Step the optimizer unless `skip`, a boolean tensor.

    A fused optimizer that can reads it on the device, without a synchronization.
    """
    inner = unwrapped(optimizer)
    for group in inner.param_groups:
        group["lr"] = learning_rate * group.get("lr_factor", 1.0)
    if skips_on_device(inner):
        inner.grad_scale, inner.found_inf = None, skip.float()
        optimizer.step()
        for name in ("grad_scale", "found_inf"):  # or the steps of another loop would be skipped
            vars(inner).pop(name, None)
    elif not skip:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _dropout_seed(*parts: int) -> int:
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part) % 2**62
    return seed
