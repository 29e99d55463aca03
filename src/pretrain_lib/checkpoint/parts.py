"""The part of a checkpoint that each process writes and reads.

Whole weights are distributed over the processes that hold the shards of a model, each writing one
file in Hugging Face's format. Optimizer moments are written as shards, each by the process that
holds it. Any number of processes can read what any other number wrote.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch.distributed import ProcessGroup, all_gather_object

from pretrain_lib.checkpoint.folders import TRAINING, listed_files
from pretrain_lib.models.any_model import ModelConfig, names_in_folder, to_folder
from pretrain_lib.models.interface import Model, saved_tensors, unwrap
from pretrain_lib.models.weight_files import weight_file, write_index, write_weights
from pretrain_lib.optim.muon import MOMENTUM
from pretrain_lib.optim.state import (
    check_storable,
    moment_bytes,
    moment_dtype,
    other_kind,
    state_names,
)
from pretrain_lib.tensors.files import stored_dtype
from pretrain_lib.tensors.piece_files import (
    StoredPiece,
    fill_piece,
    read_note,
    read_pieces,
    write_pieces,
)
from pretrain_lib.tensors.pieces import Holder, Piece, find_holder, local_piece, whole_tensor

OPTIMIZER_FILES = f"{TRAINING}/optimizer-*.safetensors"
KIND = "optimizer"  # in a file's metadata: the class of an optimizer other than AdamW and Muon
SPARE_BYTES = 2**24  # allowance for everything besides tensors


@dataclass(frozen=True)
class Part:
    """The part of a checkpoint that this process writes."""

    holder: Holder
    config: ModelConfig
    weights: dict[str, torch.Tensor]
    """With the names and shapes of transformers."""
    moments: dict[str, Piece]
    optimizer: str | None
    """The class of the optimizer, None for AdamW and Muon."""
    files: dict[str, str]
    """The file name of every weight, whichever process writes it."""
    weight_bytes: int
    """Size of all weights, in fp32."""
    checkpoint_bytes: int
    """Approximate size of the whole checkpoint."""

    def using(self, group: ProcessGroup | None) -> "Part":
        """Return the same part with another process group for the writers."""
        return replace(self, holder=replace(self.holder, group=group))


def collect_part(
    model: Model, optimizer: torch.optim.Optimizer, *, by_one: bool = False
) -> Part | None:
    """Return the part that this process writes, or None if it writes nothing.

    With `by_one` the first process writes everything. Unsharded tensors and pieces of moments are
    not copied: the part refers to the live tensors. The other tensors of a sharded model are
    gathered one by one into CPU memory, so all processes must call this together. Raises ValueError
    as `check_storable` does.
    """
    model = unwrap(model)
    check_storable(model, optimizer)
    holder = find_holder(model)
    writers = 1 if by_one else holder.count
    owners = _deal(model, writers)

    def gather(tensor: torch.Tensor, owner: int) -> torch.Tensor | None:
        whole = whole_tensor(tensor.detach())
        is_owner = holder.index == owner and not holder.is_copy
        return (whole if holder.count == 1 else whole.cpu()) if is_owner else None

    weights = {n: gather(tensor, owners[n]) for n, tensor in saved_tensors(model).items()}
    moments = _moments(model, optimizer)
    if by_one:
        moments = {name: gather(tensor, 0) for name, tensor in moments.items()}
    if holder.is_copy or holder.index >= writers:
        return None
    return Part(
        holder=Holder(0, 1) if by_one else holder,
        config=model.config,
        weights=to_folder(model, {n: t for n, t in weights.items() if t is not None}),
        moments=_own_pieces(moments, first=holder.index == 0),
        optimizer=other_kind(optimizer),
        files={
            name: weight_file(owners[tensor], writers)
            for tensor, names in names_in_folder(model).items()
            for name in names
        },
        weight_bytes=_weight_bytes(model),
        checkpoint_bytes=checkpoint_bytes(model, optimizer),
    )


def checkpoint_bytes(model: Model, optimizer: torch.optim.Optimizer) -> int:
    """Return the disk space of a checkpoint in bytes: weights, moments, and an allowance."""
    return _weight_bytes(model) + moment_bytes(optimizer) + SPARE_BYTES


def _weight_bytes(model: Model) -> int:
    """Return the size of the tensors that the weight files hold, in bytes."""
    whole = {
        name: torch.empty(tensor.shape, dtype=stored_dtype(tensor, torch.float32), device="meta")
        for name, tensor in saved_tensors(model).items()
    }
    return sum(tensor.nbytes for tensor in to_folder(model, whole).values())


def write_part(part: Part, folder: Path) -> dict[str, str]:
    """Write the files of this process into `folder`; return their xxh3_128 by name."""
    index, count = part.holder.index, part.holder.count
    digests = {}
    if part.weights:
        file = weight_file(index, count)
        digests[file] = write_weights(folder / file, part.weights)
    if part.moments:
        notes = {KIND: part.optimizer} if part.optimizer else None
        file = moments_file(index, count)
        digests[file] = write_pieces(folder / file, part.moments, notes=notes)
    if index == 0 and count > 1:
        write_index(folder, part.files, total_bytes=part.weight_bytes)
    return digests


def on_writers(part: Part, function: Callable[[], Any], *, first_only: bool = False) -> list[Any]:
    """Call `function` on all writing processes, or only on the first; return all results.

    An OSError on one process is raised on all of them, after all have finished.
    """
    outcome = [None, None]
    if part.holder.index == 0 or not first_only:
        try:
            outcome[0] = function()
        except OSError as error:
            outcome[1] = error
    outcomes = [outcome] * part.holder.count
    if part.holder.count > 1:
        all_gather_object(outcomes, outcome, group=part.holder.group)
    for _, error in outcomes:
        if error is not None:
            raise error
    return [result for result, _ in outcomes]


def load_moments(path: Path, model: Model, optimizer: torch.optim.Optimizer) -> None:
    """Load the optimizer state of a checkpoint, or the local shards of it.

    A parameter without stored moments has had no gradient yet, and begins without them. Raises
    ValueError if stored moments are of another kind of optimizer, or if they belong to no
    parameter, or to none of the optimizer.
    """
    files = [path / name for name in listed_files(path) if fnmatch(name, OPTIMIZER_FILES)]
    stored, expected = read_pieces(files), _known_state(path, files, optimizer)
    dtype = moment_dtype(optimizer) if expected else None
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        kinds = [key.rsplit(".", 1)[1] for key in stored if key.rsplit(".", 1)[0] == name]
        if kinds and parameter not in held:
            raise ValueError(
                f"{path} holds {', '.join(sorted(kinds))} of {name}, which the optimizer does not "
                f"update: build it from all parameters that were trained"
            )
        if kinds and expected and sorted(kinds) != sorted(expected[parameter]):
            raise _other_optimizer(path, name, kinds, expected[parameter])
        optimizer.state[parameter] = {
            kind: _load_state(parameter, stored.pop(f"{name}.{kind}"), dtype) for kind in kinds
        }
    if stored:
        raise ValueError(
            f"{path}: the optimizer moments {sorted(stored)[:3]}... belong to no parameter"
        )


def _known_state(
    path: Path, files: list[Path], optimizer: torch.optim.Optimizer
) -> dict[torch.Tensor, tuple[str, ...]] | None:
    """Return what AdamW or Muon keeps for each parameter, None if it is another optimizer.

    Raises ValueError if the files hold the state of another kind of optimizer.
    """
    now = other_kind(optimizer)
    before = read_note(files[0], KIND) if files else now
    if before != now:
        stored, current = (kind or "AdamW or Muon" for kind in (before, now))
        raise ValueError(
            f"{path} holds the state of {stored}, the optimizer is {current}: load it into one of "
            f"the kind that was saved, or only the weights, with load_pretrained"
        )
    return state_names(optimizer) if now is None else None


def _load_state(
    parameter: torch.Tensor, pieces: list[StoredPiece], dtype: torch.dtype | None
) -> torch.Tensor:
    """Return a stored tensor, or the local shard of it; moments in `dtype` (None: as stored)."""
    dtype_on_disk = pieces[0].piece.tensor.dtype
    if pieces[0].piece.shape:
        value = torch.zeros_like(parameter, dtype=dtype or dtype_on_disk)
    else:  # such as the step count
        value = torch.zeros((), dtype=None if dtype else dtype_on_disk, device=parameter.device)
    fill_piece(local_piece(value), pieces)
    return value


def _other_optimizer(
    path: Path, name: str, stored: Sequence[str], expected: Sequence[str]
) -> ValueError:
    before, now = ("muon" if MOMENTUM in names else "adamw" for names in (stored, expected))
    return ValueError(
        f"{path} holds {', '.join(sorted(stored))} of {name}, as optimizer.kind={before} keeps "
        f"them; this run has optimizer.kind={now}: set it back, or start a new run from these "
        f"weights with run.initial_weights={path}"
    )


def _moments(model: Model, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{kind}": tensor
        for name, parameter in model.named_parameters()
        for kind, tensor in sorted(optimizer.state.get(parameter, {}).items())
    }


def _own_pieces(tensors: dict[str, torch.Tensor], *, first: bool) -> dict[str, Piece]:
    pieces = {name: local_piece(tensor) for name, tensor in tensors.items()}
    # Step counts are scalars, the same on all processes, so only the first writes them.
    return {n: p for n, p in pieces.items() if p.tensor.numel() and (p.shape or first)}


def _deal(model: Model, processes: int) -> dict[str, int]:
    """Return which process writes each weight: largest first, each to the least loaded process."""
    load, owners = [0] * processes, {}
    sizes = {name: tensor.numel() for name, tensor in saved_tensors(model).items()}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = min(range(processes), key=lambda process: (load[process], process))
        load[owners[name]] += sizes[name]
    return owners


def moments_file(index: int, count: int) -> str:
    """Return the name of the moments file of process `index` out of `count`."""
    return OPTIMIZER_FILES.replace("*", f"{index + 1:05d}-of-{count:05d}")
