"""A torch Dataset whose item k is window k of the run, and the micro-batches of a rank per step."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Integral
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from pretrain_lib.data.tokens.arrays import TokenArray
from pretrain_lib.data.windows.best_fit import BestFitPlan
from pretrain_lib.data.windows.document_ends import narrow_document_ends
from pretrain_lib.data.windows.order import WindowOrder
from pretrain_lib.data.windows.packing import Windows, fill_planned_window, fill_window
from pretrain_lib.data.windows.shuffled import Shuffle, order_by_epoch
from pretrain_lib.data.windows.sources import name_source
from pretrain_lib.data.windows.world import find_place
from pretrain_lib.values import check_value, show

Batch = dict[str, torch.Tensor]
LARGEST_SEED = 2**63 - 1  # of the order of windows


class WindowSource(Protocol):
    """The windows that training reads, by their position in the run."""

    def batch(self, positions: Sequence[int]) -> Batch:
        """Return the windows at `positions`, stacked: `(B, T)` per tensor."""

    def cursor(self, windows: int) -> dict | None:
        """Return what a resume after `windows` windows needs besides that number, or None."""

    def close(self) -> None:
        """Stop prefetching."""


class PackedDataset(Dataset):
    """The shuffled windows of one or several token arrays: item k is window k of the run.

    Its length is one epoch, and iterating over it ends there; larger indices continue into the next
    epochs, each shuffled anew. After `set_epoch(e)` item 0 is the first window of epoch e. Items
    are dicts of `input_ids` and `targets`, int64 `(T,)`, and with `document_masking` also of
    `document_ends`, int32 `(T,)`. `plans`, one per array, select best-fit packing. With
    `shuffle="documents"` each epoch permutes the documents too, before windows are cut from them.
    """

    def __init__(
        self,
        tokens: TokenArray | Sequence[TokenArray],
        *,
        sequence_length: int,
        seed: int = 0,
        weights: Sequence[float] | None = None,
        document_masking: bool = False,
        plans: Sequence[BestFitPlan] | None = None,
        shuffle: Shuffle = "windows",
    ) -> None:
        self.sources = [tokens] if isinstance(tokens, TokenArray) else list(tokens)
        if not self.sources or not all(isinstance(s, TokenArray) for s in self.sources):
            raise ValueError(
                f"tokens={show(tokens)} must be a token array, or a list of some: what "
                f"pretrain_lib.open_split(FOLDER, 'train') returns"
            )
        sequence_length = check_value(sequence_length, "sequence_length", int, minimum=1)
        seed = check_value(seed, "seed", int, minimum=0, maximum=LARGEST_SEED)
        check_value(document_masking, "document_masking", bool)
        check_value(shuffle, "shuffle", Shuffle)
        if document_masking and not all(source.has_documents for source in self.sources):
            raise ValueError(
                "data.document_masking=true needs document ends, which an array of data.path does "
                "not have; prepare the text with `pretrain prepare`"
            )
        assert plans is None or [p.sequence_length for p in plans] == (
            [sequence_length] * len(self.sources)
        ), "the plans are of other windows"
        self.sequence_length = sequence_length
        self.document_masking = document_masking
        self.plans = plans
        # Shared with the workers of a DataLoader that outlive an epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._by_epoch = order_by_epoch(shuffle, self.sources, seed=seed, plans=plans)
        self.order = WindowOrder(
            num_tokens=tuple(len(source) for source in self.sources),
            sequence_length=sequence_length,
            seed=seed,
            weights=None if weights is None else tuple(weights),
            planned_windows=tuple(plan.num_windows for plan in plans) if plans else None,
            names=tuple(map(name_source, self.sources)),
        )

    def __len__(self) -> int:
        return sum(self.order.windows_per_epoch(s) for s in range(len(self.sources)))

    def __iter__(self) -> Iterator[Batch]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Batch]:
        """Return several windows; a DataLoader calls this instead of `__getitem__`."""
        batch = self.batch(check_positions(indices) + int(self._epoch) * len(self))
        return [{name: rows[i] for name, rows in batch.items()} for i in range(len(indices))]

    def set_epoch(self, epoch: int) -> None:
        """Count items, not those of `batch`, from an epoch's start; Accelerate calls this."""
        check_value(epoch, "epoch", int, minimum=0)
        self._epoch.fill_(epoch)

    def batch(self, positions: Sequence[int]) -> Batch:
        """Return the windows at `positions`, stacked: `(B, T)` per tensor."""
        numbers = check_positions(positions)
        windows = Windows.empty(
            len(positions), self.sequence_length, document_masking=self.document_masking
        )
        located = (array.tolist() for array in self.order.locate(numbers))
        for row, (s, epoch, first) in enumerate(zip(*located, strict=True)):
            if self.plans is None:
                fill_window(windows, row, self._by_epoch[s].tokens(epoch), first)
            else:
                fill_planned_window(windows, row, self.sources[s], self.plans[s], first)
        return {name: torch.from_numpy(array) for name, array in windows.as_dict().items()}

    def cursor(self, windows: int) -> None:  # noqa: ARG002 (the number of windows is enough)
        """Return None: the number of windows is all that a resume needs."""

    def close(self) -> None:
        """Do nothing, since nothing is prefetched."""


def check_positions(positions: Sequence[int]) -> np.ndarray:
    """Return the positions of windows in the run as int64, or say why they are none."""
    if not all(isinstance(position, Integral) for position in positions):
        raise ValueError(f"windows {show(positions)} must be whole numbers")
    if min(positions, default=0) < 0:
        raise IndexError(f"window {min(positions)}: windows count from 0 at the run's start")
    return np.array(positions, dtype=np.int64)


def rank_micro_batches(
    dataset: WindowSource,
    first: int,
    count: int,
    *,
    micro_batch: int,
    rank: int | None = None,
    world_size: int | None = None,
) -> list[Batch]:
    """Return one rank's micro-batches of the step that reads windows `[first, first + count)`.

    Micro-batch m of the step holds its windows `[m * b, (m + 1) * b)`, whatever the world size, and
    goes to rank m mod `world_size`; both are those of torch.distributed if not given. `(b, T)` per
    tensor, b being `micro_batch`.
    """
    micro_batch = check_value(micro_batch, "micro_batch", int, minimum=1)
    rank, world_size = find_place(rank, world_size)
    if count < 1 or count % (micro_batch * world_size):
        raise ValueError(
            f"a step of {count} windows does not divide into micro-batches of micro_batch="
            f"{micro_batch} for world_size={world_size}; give {micro_batch * world_size} "
            f"windows, or a multiple of that"
        )
    starts = range(first + rank * micro_batch, first + count, world_size * micro_batch)
    positions = [start + i for start in starts for i in range(micro_batch)]
    batch = dataset.batch(positions)
    return [
        {name: rows[i : i + micro_batch] for name, rows in batch.items()}
        for i in range(0, len(positions), micro_batch)
    ]


def iterate_steps(
    dataset: WindowSource,
    steps: Iterable[tuple[int, int]],
    *,
    micro_batch: int,
    device: torch.device | str,
    rank: int | None = None,
    world_size: int | None = None,
) -> Iterator[list[Batch]]:
    """Yield this rank's micro-batches of each step `(first window, windows of all ranks)`.

    They are on `device`. `rank` and `world_size` are those of torch.distributed if not given.
    Prefetches the next step, into pinned memory for CUDA, while the current one is computed.
    """
    device = torch.device(device)
    rank, world_size = find_place(rank, world_size)

    def load(step: tuple[int, int]) -> list[Batch]:
        batches = rank_micro_batches(
            dataset, *step, micro_batch=micro_batch, rank=rank, world_size=world_size
        )
        batches = [narrow_document_ends(batch) for batch in batches]
        if device.type == "cuda":
            return [{name: t.pin_memory() for name, t in batch.items()} for batch in batches]
        return batches

    with ThreadPoolExecutor(1, thread_name_prefix="batches") as reader:
        pending = None
        for step in steps:
            upcoming = reader.submit(load, step)
            if pending is not None:
                yield [to_device(batch, device) for batch in pending.result()]
            pending = upcoming
        if pending is not None:
            yield [to_device(batch, device) for batch in pending.result()]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch to `device`; the copy is asynchronous if the batch is pinned."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
