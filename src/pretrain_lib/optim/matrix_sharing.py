"""Share out work on whole matrices over the processes that hold them, or their shards.

Shapes: K matrices of one shape, dealt to the processes in equal shares, the last ones less.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import distributed
from torch.distributed.tensor import DTensor

from pretrain_lib.tensors.pieces import holder_of


@dataclass(frozen=True)
class MatrixSharing:
    """The processes among which matrices are dealt, and the place of this one."""

    index: int = 0
    count: int = 1
    group: distributed.ProcessGroup | None = None
    is_sharded: bool = False
    """Whether each process holds some rows of every matrix (FSDP2), not the whole (DDP)."""

    def apply(
        self, function: Callable[[torch.Tensor], torch.Tensor], held: torch.Tensor, rows: int
    ) -> torch.Tensor:
        """Apply `function` to K matrices of `rows` rows; return what this process holds of them.

        `held` (K, rows held, n) is what this process holds. `function` takes and returns
        (matrices, rows, n), which may be none. All processes must call this together.
        """
        if self.count == 1:
            return function(held)
        if self.is_sharded:
            return self._of_shards(function, held, rows)
        return self._of_copies(function, held)

    def _of_copies(
        self, function: Callable[[torch.Tensor], torch.Tensor], whole: torch.Tensor
    ) -> torch.Tensor:
        """Work on the own share of matrices, which every process holds, and gather the results."""
        share = deal(len(whole), self.count)[0]
        local = function(whole[self.index * share :][:share])
        padded = local.new_zeros(share, *local.shape[1:])
        padded[: len(local)] = local
        gathered = local.new_empty(self.count * share, *local.shape[1:])
        distributed.all_gather_into_tensor(gathered, padded, group=self.group)
        return gathered[: len(whole)]

    def _of_shards(
        self, function: Callable[[torch.Tensor], torch.Tensor], held: torch.Tensor, rows: int
    ) -> torch.Tensor:
        """Collect the own share of matrices from the rows that all hold, and return the results."""
        columns, shares = held.shape[2], deal(len(held), self.count)
        heights = deal(rows, self.count)
        assert held.shape[1] == heights[self.index], "FSDP2 must shard rows as torch.chunk does"
        matrices = shares[self.index]
        sent = [share * held.shape[1] * columns for share in shares]
        received = [matrices * height * columns for height in heights]
        flat = held.new_empty(sum(received))
        self._exchange(flat, held.reshape(-1), received, sent)
        pieces = zip(flat.split(received), heights, strict=True)
        whole = torch.cat(
            [piece.view(matrices, height, columns) for piece, height in pieces], dim=1
        )
        done = function(whole)
        flat = torch.cat([piece.reshape(-1) for piece in done.split(heights, dim=1)])
        back = done.new_empty(held.numel())
        self._exchange(back, flat, sent, received)
        return back.view(held.shape)

    def _exchange(
        self, output: torch.Tensor, flat: torch.Tensor, received: list[int], sent: list[int]
    ) -> None:
        distributed.all_to_all_single(output, flat, received, sent, group=self.group)


def find_sharing(parameter: torch.Tensor) -> MatrixSharing:
    """Return among which processes the work on a parameter can be dealt."""
    if isinstance(parameter, DTensor):
        holder = holder_of(parameter)
        return MatrixSharing(holder.index, holder.count, holder.group, is_sharded=True)
    if distributed.is_initialized():
        return MatrixSharing(distributed.get_rank(), distributed.get_world_size())
    return MatrixSharing()


def deal(number: int, count: int) -> list[int]:
    """Return how many of `number` rows or matrices each of `count` processes gets.

    They are dealt as by `torch.chunk`, and so the rows of a matrix as FSDP2 shards them.
    """
    share = -(-number // count)
    return [min(share, max(0, number - i * share)) for i in range(count)]
