"""How a model is spread over devices, and what they send one another in a step."""

from dataclasses import dataclass

FP32 = 4  # bytes


@dataclass(frozen=True)
class World:
    """The devices of a run and how the model lies on them."""

    devices: int = 1
    group: int = 1
    """Devices that share one copy of weights, gradients and moments: 1 for DDP, all for FSDP2, in
    between for HSDP."""
    gather_bytes: int = FP32
    """Bytes of a weight as the group gathers it: 4, or 2 in bf16."""

    @property
    def is_sharded(self) -> bool:
        """Whether no device holds the whole model by itself."""
        return self.group > 1

    @property
    def sharding(self) -> str:
        """The name of it: none, DDP, FSDP2, or HSDP with its groups."""
        if not self.is_sharded:
            return "DDP" if self.devices > 1 else "none"
        groups = self.devices // self.group
        return "FSDP2" if groups == 1 else f"HSDP {groups} x {self.group}"


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters, the padding rows of the tables included."""

    total: int
    block: int
    """Of one of the layers, which are gathered one by one; the rest stays gathered in a step."""
    num_layers: int

    @property
    def root(self) -> int:
        """All that is in no layer: embeddings, last norm, head."""
        return self.total - self.num_layers * self.block


def sent_bytes(sizes: Sizes, world: World, *, micro_batches: int) -> float:
    """Return the bytes that each device sends, and receives, in an optimizer step.

    A ring of n devices that gathers or reduces a tensor moves (n - 1) / n of it over each device,
    and one that does both (an all-reduce) twice as much. Gradients go once per step, in fp32;
    sharded weights are gathered for each micro-batch: the layers in forward and in backward, the
    rest once.
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
