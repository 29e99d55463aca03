"""What Muon takes beside the model: memory, communication and FLOPs, from shapes alone."""

from collections import Counter
from dataclasses import dataclass

from torch import nn

from pretrain_lib.optim.muon import BATCH_ELEMENTS
from pretrain_lib.optim.newton_schulz import newton_schulz_flops
from pretrain_lib.optim.parameters import parameter_groups
from pretrain_lib.plan.network import World

# Copies of a matrix at a time: its direction, and an iteration's input and output. Besides, two
# products of the shorter side.
COPIES = 3


@dataclass(frozen=True)
class MuonCost:
    """What a device spends on Muon."""

    elements: int
    """Elements of all matrices that Muon updates; each has one moment instead of AdamW's two."""
    working_bytes: int
    """Memory at the height of the update, beside weights, gradients and moments."""
    sent_bytes: float
    """Bytes that a device sends, and also receives, in a step."""
    flops: int
    """FLOPs of a step on the device that has the largest share."""


def muon_cost(model: nn.Module, world: World, *, itemsize: int) -> MuonCost:
    """Return the cost of Muon, whose orthogonalization computes with `itemsize` bytes a number.

    Each matrix is orthogonalized by one of the devices that hold it or its shards: under DDP they
    gather the results; under FSDP2 the rows are sent to that device and back.
    """
    workers = world.group if world.is_sharded else world.devices
    shapes = _layer_matrices(model)
    elements = sum(rows * columns * n for (rows, columns, _), n in shapes.items())
    shares = {shape: -(-number // workers) for shape, number in shapes.items()}
    other_share = (workers - 1) / workers
    # Sharded, a device sends its rows, and later the rows of others of the matrices that it had.
    trips = 2 / workers if world.is_sharded else 1
    return MuonCost(
        elements=elements,
        working_bytes=itemsize * max(_elements_at_a_time(*s, n) for s, n in shares.items()),
        sent_bytes=trips * other_share * itemsize * elements,
        flops=sum(
            share * parts * newton_schulz_flops(rows // parts, columns)
            for (rows, columns, parts), share in shares.items()
        ),
    )


def _layer_matrices(model: nn.Module) -> Counter[tuple[int, int, int]]:
    """Count the matrices of the layers by rows, columns and matrices stacked in each."""
    groups = parameter_groups(model, weight_decay=0.0, muon=True)
    return Counter((*p.shape, g["parts"]) for g in groups if g["parts"] for p in g["params"])


def _elements_at_a_time(rows: int, columns: int, parts: int, share: int) -> int:
    number = min(share, max(1, BATCH_ELEMENTS // (rows * columns)))
    side = min(rows // parts, columns)
    return number * (COPIES * rows * columns + 2 * parts * side**2)
