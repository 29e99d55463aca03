"""What the settings of a run may be, each and together.

`config` is a `config.Recipe` everywhere.
"""

from typing import Any

from pretrain_lib.data.windows.best_fit import PACKINGS
from pretrain_lib.models.blocks import ACTIVATION_CHECKPOINTING
from pretrain_lib.optim.adamw_bf16 import HIGHEST_BETA as HIGHEST_BF16_BETA
from pretrain_lib.optim.spikes import ACTIONS

# The smallest value of each number that has one; null stays allowed where it means "never".
LOWEST = {
    "data.workers": 1,
    "data.max_rejected": 0,
    "batch.micro_batch": 1,
    "batch.sequence_length": 1,
    "optimizer.learning_rate": 0,
    "optimizer.weight_decay": 0,
    "optimizer.z_loss": 0,
    "samples.per_prompt": 1,
    "samples.tokens": 1,
    "samples.temperature": 0,
    "samples.top_k": 1,
    "samples.every": 1,
    "samples.growth": 1,
    "scores.every": 1,
    "scores.limit": 1,
    "scores.batch_size": 1,
    "run.max_steps": 0,
    "run.save_every": 1,
    "run.save_every_tokens": 1,
    "run.keep_last": 0,
    "run.keep_every": 1,
    "run.spike_sigma": 0,
    "run.spike_window": 2,
    "run.collective_timeout": 1,
    "run.log_every": 1,
    "run.evaluate_every": 1,
    "run.max_skipped": 1,
}
CHOICES = {
    "data.packing": PACKINGS,
    "optimizer.moments": ("fp32", "bf16"),
    "run.gather": ("fp32", "bf16"),
    "run.recompute": ACTIVATION_CHECKPOINTING,
    "run.spike_action": ACTIONS,
}


def check_values(config: Any) -> None:
    """Raise ValueError for a value that is below its lowest, or none of the choices."""
    for name, lowest in LOWEST.items():
        section, _, setting = name.partition(".")
        value = getattr(getattr(config, section), setting)
        if value is not None and value < lowest:
            raise ValueError(f"{name}={value} must be at least {lowest}")
    for name, choices in CHOICES.items():
        section, _, setting = name.partition(".")
        value = getattr(getattr(config, section), setting)
        if value not in choices:
            raise ValueError(f"{name}={value} must be {' or '.join(choices)}")


def check_together(config: Any) -> None:
    """Raise ValueError for settings that contradict one another."""
    if config.optimizer.moments == "bf16" and config.optimizer.betas[1] > HIGHEST_BF16_BETA:
        raise ValueError(
            f"optimizer.betas={list(config.optimizer.betas)}: with optimizer.moments=bf16 the "
            f"second must be at most {HIGHEST_BF16_BETA}, or its moment would round back to "
            f"what it was; lower it, or keep the moments in fp32"
        )
    if config.optimizer.max_grad_norm <= 0:
        raise ValueError(
            f"optimizer.max_grad_norm={config.optimizer.max_grad_norm} must be above 0; for no "
            f"clipping give a large number such as 1e9"
        )
    if config.batch.sequence_length > config.model.context_length:
        raise ValueError(
            f"batch.sequence_length={config.batch.sequence_length} is longer than "
            f"model.context_length={config.model.context_length}; shorten the one or raise the "
            f"other"
        )


def check_division(config: Any, *, processes: int) -> None:
    """Raise ValueError unless steps are whole micro-batches on so many processes."""
    unit = processes * config.batch.micro_batch * config.batch.sequence_length
    text = (
        f"{processes} processes x {config.batch.micro_batch} sequences "
        f"x {config.batch.sequence_length} tokens = {unit}"
    )
    for name in ("tokens", "ramp_from", "ramp_increment"):
        tokens = getattr(config.batch, name)
        if tokens is not None and (tokens % unit or tokens <= 0):
            raise does_not_divide(name, tokens, text, unit)


def does_not_divide(name: str, tokens: int, unit_text: str, unit: int) -> ValueError:
    """Return the error for `batch.NAME` tokens that are no multiple of a unit."""
    nearest = max(1, round(tokens / unit)) * unit
    return ValueError(
        f"batch.{name}={tokens} must be a multiple of {unit_text}; nearest: {nearest}"
    )
