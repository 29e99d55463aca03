"""Parallelism of a run, and the bytes that its devices send in a step."""

from dataclasses import dataclass

FP32 = 4  # bytes


@dataclass(frozen=True)
class World:
    """The number of devices of a run, and how the model is sharded over them."""

    devices: int = 1
    group: int = 1
    """Devices over which one copy of weights, gradients and moments is sharded: 1 for DDP, all for
    FSDP2, a number in between for HSDP."""
    gather_bytes: int = FP32
    """Bytes per weight in the all-gather: 4, or 2 in bf16."""

    @property
    def is_sharded(self) -> bool:
        """Whether the model is sharded, so that no device holds all of it."""
        return self.group > 1

    @property
    def sharding(self) -> str:
        """The name of the strategy: none, DDP, FSDP2, or HSDP with groups x devices."""
        if not self.is_sharded:
            return "DDP" if self.devices > 1 else "none"
        groups = self.devices // self.group
        return "FSDP2" if groups == 1 else f"HSDP {groups} x {self.group}"


@dataclass(frozen=True)
class Sizes:
    """Parameter counts, including padding rows of the vocabulary."""

    total: int
    block: int
    """Parameters of one layer. Layers are gathered one by one; the rest stays gathered."""
    num_layers: int

    @property
    def root(self) -> int:
        """Parameters outside the layers: embeddings, final norm, output projection."""
        return self.total - self.num_layers * self.block


def sent_bytes(sizes: Sizes, world: World, *, micro_batches: int) -> float:
    """Return the bytes that each device sends, and also receives, in an optimizer step.

    In a ring all-gather or reduce-scatter over n devices, each device sends (n - 1) / n of the
    tensor, in an all-reduce twice as much. Gradients are reduced once per step, in fp32. Sharded
    weights are gathered for every micro-batch: the layers in forward and in backward, the rest
    once.
    """
    gradients = FP32 * sizes.total
    if world.group == 1:
        return 2 * _share(world.devices) * gradients
    layers = sizes.num_layers * sizes.block
    gathered = micro_batches * world.gather_bytes * (2 * layers + sizes.root)
    within = _share(world.group) * (gathered + gradients)
    return within + 2 * _share(world.devices // world.group) * gradients / world.group


def _share(devices: int) -> float:
    return (devices - 1) / devices
