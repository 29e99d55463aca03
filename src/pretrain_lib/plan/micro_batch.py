"""The step of a planned run, and the largest micro-batch that a device has the memory for."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pretrain_lib.config.rules import check_division
from pretrain_lib.config.settings import Recipe
from pretrain_lib.models.interface import Model
from pretrain_lib.plan.memory import estimate_memory
from pretrain_lib.plan.network import World
from pretrain_lib.plan.step import Step

FILLED = 0.9  # the part of the memory that a recommended micro-batch takes at most


@dataclass(frozen=True)
class Planned:
    """A recipe with what its data say about it."""

    config: Recipe
    documents_per_token: float = 0
    """Documents that are kept apart; 0 without document masking."""
    precision: str = "bf16"
    """Precision of the matrix products: bf16 or fp32."""

    def step(self, world: World, *, sequences: int | None = None, kind: str | None = None) -> Step:
        """Return the step, by default with the recipe's micro-batch and checkpointing."""
        batch, system = self.config.batch, self.config.system
        sequences = sequences or batch.micro_batch
        tokens = sequences * batch.sequence_length
        return Step(
            sequences=sequences,
            length=batch.sequence_length,
            micro_batches=max(1, round(batch.tokens / (world.devices * tokens))),
            precision=self.precision,
            activation_checkpointing=kind or system.activation_checkpointing,
            moments=self.config.optimizer.moments,
            muon=self.config.optimizer.kind == "muon",
            compiled=system.compile is not False,
            documents=math.ceil(self.documents_per_token * tokens),
        )

    def largest_micro_batch(self, model: Model, world: World, memory_gb: float) -> int | None:
        """Return the largest power of two that fits and divides the step; None if there is none."""
        for sequences in self._micro_batches(world):
            step = self.step(world, sequences=sequences)
            if estimate_memory(model, step, world).peak <= FILLED * memory_gb * 1e9:
                return sequences
        return None

    def memory_line(self, model: Model, world: World, memory_gb: float) -> str:
        """Return what a step is expected to take of a device's memory, and what would fit it."""
        try:
            peak = estimate_memory(model, self.step(world), world).peak / 1e9
        except ValueError as error:  # the run can be made without an estimate
            return f"unknown; {error}"
        line = f"about {peak:.3g} of {memory_gb:.3g} GB of each device"
        largest = self.largest_micro_batch(model, world, memory_gb)
        if peak > FILLED * memory_gb:
            if largest is None:
                return f"{line}, which may not fit, as no micro-batch does: --plan shows what would"
            return f"{line}, which may not fit; --batch.micro_batch {largest} does"
        if largest is not None and largest > self.config.batch.micro_batch:
            return f"{line}; --batch.micro_batch {largest} fits too, in fewer and larger products"
        return line

    def _micro_batches(self, world: World) -> Iterator[int]:
        """Yield the powers of two that divide the step, the largest first."""
        batch = self.config.batch
        exponents = range((batch.tokens // batch.sequence_length).bit_length())
        for sequences in (2**exponent for exponent in reversed(exponents)):
            changed = replace(self.config, batch=replace(batch, micro_batch=sequences))
            if divides(changed, world.devices):
                yield sequences


def divides(config: Recipe, devices: int) -> bool:
    """Return whether each step consists of whole micro-batches on `devices` devices."""
    try:
        check_division(config, processes=devices)
    except ValueError:
        return False
    return True
