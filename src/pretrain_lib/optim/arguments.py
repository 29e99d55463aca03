"""Check the arguments of the optimizers; the same checks apply to recipes."""

from typing import Literal

from pretrain_lib.optim.adamw_bf16 import HIGHEST_BETA
from pretrain_lib.values import check_value

Moments = Literal["fp32", "bf16"]


def check_rates(learning_rate: float, **others: float | None) -> None:
    """Raise ValueError for a negative rate, or one that is no multiple of `learning_rate`."""
    check_value(learning_rate, "learning_rate", float, minimum=0)
    for name, rate in others.items():
        check_value(rate, name, float | None, minimum=0)
        if rate is not None and not learning_rate:
            raise ValueError(
                f"{name}={rate}: learning_rate must be above 0, because the schedule of the other "
                f"rates is a multiple of its own"
            )


def check_moments(moments: str, betas: tuple[float, float]) -> None:
    """Raise ValueError for a dtype of moments that is unknown, or too coarse for a decay rate."""
    check_value(moments, "moments", Moments)
    check_value(betas, "betas", tuple[float, float], minimum=0, below=1)
    if moments == "bf16" and betas[1] > HIGHEST_BETA:
        raise ValueError(
            f"betas={list(betas)}: with moments=bf16 the second must be at most {HIGHEST_BETA}, or "
            f"its moment would round back to what it was; lower it, or keep the moments in fp32"
        )
