"""Rotary position embeddings (RoPE, Su et al. 2021), and their scaling for longer contexts.

Shapes: B sequences, T positions.
"""

import math
from dataclasses import MISSING, dataclass, fields
from typing import Literal

import torch

from pretrain_lib.values import check_fields, did_you_mean, setting, show

# The fields that each kind of scaling uses in addition to `kind` and `factor`.
FIELDS = {
    "linear": (),
    "dynamic": (),
    "llama3": ("original_context_length", "low_frequency_factor", "high_frequency_factor"),
    "yarn": ("original_context_length", "beta_fast", "beta_slow", "attention_factor"),
}


@dataclass(frozen=True)
class RopeScaling:
    """RoPE scaling, for a context longer than that of the original training."""

    kind: Literal["linear", "llama3", "yarn", "dynamic"] = setting(
        MISSING,
        "linear (all positions divided by the factor, Chen et al. 2023), llama3 (Llama 3.1: slow "
        "dimensions only), yarn (Peng et al. 2023), or dynamic (NTK: no change within the "
        "context, to which sequences are held; kept for other programs).",
    )
    factor: float = setting(MISSING, "How much longer the context is made.", minimum=1)
    original_context_length: int | None = setting(
        None, "That of the first training, for llama3 and yarn.", unit="tokens", minimum=1
    )
    low_frequency_factor: float = setting(
        1.0,
        "Of llama3: what turns fewer times in the original context is scaled wholly.",
        minimum=0,
    )
    high_frequency_factor: float = setting(
        4.0, "Of llama3: what turns more often is not scaled.", minimum=0
    )
    beta_fast: float = setting(
        32.0,
        "Of yarn: what turns more often in the original context is not scaled.",
        above=0,
    )
    beta_slow: float = setting(1.0, "Of yarn: what turns fewer times is scaled wholly.", above=0)
    attention_factor: float | None = setting(
        None, "Of yarn: times cosine and sine; null: 0.1 ln(factor) + 1.", above=0
    )

    def __post_init__(self) -> None:
        name = "model.rope_scaling"
        check_fields(self, name=name)
        for field in fields(self)[2:]:
            value, used = getattr(self, field.name), field.name in FIELDS[self.kind]
            if not used and value != field.default:
                raise ValueError(f"{name}.{field.name}={value} has no meaning for {self.kind}")
            if used and field.name == "original_context_length" and not value:
                raise ValueError(f"{name}.{field.name} must be given for {self.kind}")
        if not self.low_frequency_factor < self.high_frequency_factor:
            raise ValueError(
                f"{name}.low_frequency_factor={self.low_frequency_factor} must be below "
                f"{name}.high_frequency_factor={self.high_frequency_factor}"
            )


def read_scaling(written: dict) -> RopeScaling:
    """Return the scaling of a mapping of its fields, such as {"kind": "linear", "factor": 2.0}."""
    names = [field.name for field in fields(RopeScaling)]
    wrong = [f"has no {show(name)}{did_you_mean(name, names)}" for name in written.keys() - names]
    wrong += [f"lacks {name}" for name in ("kind", "factor") if name not in written]
    if wrong:
        raise ValueError(
            f"model.rope_scaling={written} must be a RopeScaling or its fields "
            f"({', '.join(names)}): it {wrong[0]}"
        )
    return RopeScaling(**written)


def rotary_angles(
    positions: torch.Tensor, head_width: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cosines and sines of the rotation angles, each (B, 1, T, head_width) in fp32.

    `positions` (B, T). Dimensions i and i + head_width / 2 form a pair, as in transformers.
    """
    exponents = torch.arange(0, head_width, 2, device=positions.device).float() / head_width
    frequencies = _scale(1.0 / theta**exponents, head_width, theta, scaling)
    angles = positions[:, None, :, None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    if scaling is None or scaling.kind != "yarn":
        return angles.cos(), angles.sin()
    factor = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
    return angles.cos() * factor, angles.sin() * factor


def _scale(
    frequencies: torch.Tensor, head_width: int, theta: float, scaling: RopeScaling | None
) -> torch.Tensor:
    """Scale the rotary frequencies, in radians per position, (head_width / 2,)."""
    if scaling is None or scaling.kind == "dynamic":
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    rule = _kept_by_llama3 if scaling.kind == "llama3" else _kept_by_yarn
    share = rule(frequencies, head_width, theta, scaling)  # weight of the unscaled frequency
    return (1 - share) * frequencies / scaling.factor + share * frequencies


def _kept_by_llama3(
    frequencies: torch.Tensor, head_width: int, theta: float, scaling: RopeScaling
) -> torch.Tensor:
    """Return the weight of the unscaled frequencies in llama3 scaling.

    It rises linearly from 0 to 1 with the number of turns within the original context, between
    `low_frequency_factor` and `high_frequency_factor`.
    """
    turns = scaling.original_context_length / (2 * math.pi / frequencies)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    return ((turns - low) / (high - low)).clamp(0, 1)


def _kept_by_yarn(
    frequencies: torch.Tensor, head_width: int, theta: float, scaling: RopeScaling
) -> torch.Tensor:
    """Return the weight of the unscaled frequencies in YaRN scaling.

    It falls linearly from 1 to 0 with the dimension, between the dimensions that make `beta_fast`
    and `beta_slow` turns within the original context, rounded outwards to whole dimensions.
    """

    def dimension(turns: float) -> float:
        length = scaling.original_context_length / (2 * math.pi * turns)
        return head_width * math.log(length) / (2 * math.log(theta))

    first = max(math.floor(dimension(scaling.beta_fast)), 0)
    last = min(math.ceil(dimension(scaling.beta_slow)), head_width - 1)
    index = torch.arange(len(frequencies), device=frequencies.device).float()
    # 0.001 avoids a division by zero if both dimensions are equal, as in transformers.
    return 1 - ((index - first) / (last - first or 0.001)).clamp(0, 1)


def rotate(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Apply the rotation to queries or keys (B, H, T, head_width), in fp32; keep their dtype."""
    cosine, sine = rotation
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x * cosine + turned * sine).to(x.dtype)
