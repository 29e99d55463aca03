"""Checkpoints: Hugging Face model folders with what a resume needs inside. Floor 3.

A checkpoint is written under a temporary name, hashed, flushed to disk and then renamed, and older
ones are pruned after that: at every instant the newest whole one is whole. Nothing is pickled.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pretrain_lib.data.order import ORDER_VERSION
from pretrain_lib.data.shards import write_json
from pretrain_lib.data.tokenizer import Tokenizer
from pretrain_lib.models.hf import Model, load_weights, save_pretrained

STATE_VERSION = 1
TRAINING = "training"  # inside a checkpoint: what a resume needs beyond the model
OPTIMIZER, STATE, MANIFEST, FILES = (
    f"{TRAINING}/{name}"
    for name in ("optimizer.safetensors", "state.json", "manifest.json", "files.json")
)
NAME = re.compile(r"step-(\d{8})")
HASH_CHUNK = 2**24


@dataclass
class TrainingState:
    """Where a run stands, after whole optimizer steps."""

    step: int = 0
    windows: int = 0
    """Windows consumed: the position in the data."""
    tokens: int = 0
    """Tokens trained on."""
    seconds: float = 0.0
    """Time spent training, in all sessions."""
    skipped: int = 0
    """Updates left out because the gradient was not finite."""
    row_loss: float = 0.0
    """Nats since the last row of metrics, over all targets since."""
    row_targets: int = 0
    row_tokens: int = 0
    row_seconds: float = 0.0
    stream: dict | None = None
    """Where in its source a stream's present segment begins."""
    order_version: int = ORDER_VERSION
    state_version: int = STATE_VERSION

    def count_step(self, *, windows: int, tokens: int, seconds: float) -> None:
        """Move on by one optimizer step."""
        self.step += 1
        self.windows += windows
        self.tokens += tokens
        self.row_tokens += tokens
        self.seconds += seconds
        self.row_seconds += seconds

    def begin_row(self) -> None:
        """Begin to gather the next row of metrics."""
        self.row_loss, self.row_targets, self.row_tokens, self.row_seconds = 0.0, 0, 0, 0.0


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies in a run's `checkpoints` folder."""
    return folder / f"step-{step:08d}"


def save_checkpoint(
    folder: Path,
    state: TrainingState,
    model: Model,
    optimizer: torch.optim.Optimizer,
    *,
    tokenizer: Tokenizer | None,
    manifest: dict,
    keep_last: int = 0,
) -> Path:
    """Write the checkpoint of `state.step` into `folder`, commit it, prune all but `keep_last`.

    To be called on one process. Returns the checkpoint's path.
    """
    target = checkpoint_path(folder, state.step)
    temporary = folder / f".{target.name}.tmp"
    if temporary.exists():
        shutil.rmtree(temporary)
    save_pretrained(model, temporary, tokenizer=tokenizer)
    (temporary / TRAINING).mkdir()
    save_file(_optimizer_tensors(model, optimizer), temporary / OPTIMIZER)
    write_json(temporary / STATE, asdict(state))
    write_json(temporary / MANIFEST, manifest)
    write_json(temporary / FILES, _hash_files(temporary))
    _flush_to_disk(temporary)
    if target.exists():
        shutil.rmtree(target)
    temporary.rename(target)
    _flush_to_disk(folder, recursive=False)
    _prune(folder, target, keep_last=keep_last)
    return target


def _prune(folder: Path, newest: Path, *, keep_last: int) -> None:
    """Remove what the checkpoint just committed makes obsolete, never that one.

    Later steps are of a past that the run has turned back from.
    """
    earlier = [path for path in _by_age(folder) if path.name < newest.name]
    obsolete = [path for path in _by_age(folder) if path.name > newest.name]
    if keep_last:
        obsolete += earlier[: max(0, len(earlier) + 1 - keep_last)]
    for path in obsolete:
        shutil.rmtree(path)


def find_newest(folder: Path) -> Path | None:
    """Return the newest whole checkpoint, passing over broken ones with a warning."""
    for path in reversed(_by_age(folder)):
        if not (problems := verify_checkpoint(path)):
            return path
        warnings.warn(f"passing over a broken checkpoint: {'; '.join(problems)}", stacklevel=2)
    return None


def verify_checkpoint(path: Path) -> list[str]:
    """Return what is wrong with a checkpoint, one line a file; nothing if it is whole."""
    if not (path / FILES).is_file():
        return [f"{path / FILES}: missing"]
    try:
        expected = json.loads((path / FILES).read_text())
    except ValueError:
        return [f"{path / FILES}: not readable"]
    found = _hash_files(path)
    problems = [f"{path / name}: missing" for name in expected.keys() - found.keys()]
    added = {name for name in found.keys() - expected.keys() if not _is_hidden(name)}
    problems += [f"{path / name}: not part of it" for name in added]
    problems += [
        f"{path / name}: its bytes differ from its hash"
        for name in expected.keys() & found.keys()
        if expected[name] != found[name]
    ]
    return sorted(problems)


def read_state(path: Path) -> tuple[TrainingState, dict]:
    """Return the state and the manifest of a checkpoint."""
    if not (path / STATE).is_file():
        raise ValueError(f"run.resume={path} is not a checkpoint: it has no {STATE}")
    values = json.loads((path / STATE).read_text())
    if values.get("state_version") != STATE_VERSION:
        raise ValueError(
            f"{path}: state_version={values.get('state_version')} is not the {STATE_VERSION} that "
            f"this version reads"
        )
    return TrainingState(**values), json.loads((path / MANIFEST).read_text())


def load_checkpoint(path: Path, model: Model, optimizer: torch.optim.Optimizer) -> None:
    """Fill model and optimizer from a checkpoint."""
    load_weights(model, path)
    tensors = load_file(path / OPTIMIZER)
    for name, parameter in model.named_parameters():
        kinds = {key.rsplit(".", 1)[1] for key in tensors if key.startswith(f"{name}.")}
        state = {kind: tensors.pop(f"{name}.{kind}") for kind in kinds}
        if any(t.shape not in (parameter.shape, torch.Size()) for t in state.values()):
            raise ValueError(f"{path}: the optimizer's state of {name} does not fit the model")
        optimizer.state[parameter] = {k: t.to(parameter.device) for k, t in state.items()}
    if tensors:
        raise ValueError(f"{path}: the optimizer's {sorted(tensors)[:3]}... belong to no parameter")


def _optimizer_tensors(model: Model, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{kind}": tensor.detach().contiguous()
        for name, parameter in model.named_parameters()
        for kind, tensor in optimizer.state.get(parameter, {}).items()
    }


def _is_hidden(name: str) -> bool:
    """Whether a file is one of those that a desktop leaves in folders (.DS_Store)."""
    return Path(name).name.startswith(".")


def _by_age(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if NAME.fullmatch(path.name))


def _hash_files(path: Path) -> dict[str, dict]:
    """Return size and sha256 of every file of a checkpoint but the list of them."""
    hashes = {}
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        name = file.relative_to(path).as_posix()
        if name == FILES:
            continue
        digest = hashlib.sha256()
        with file.open("rb") as content:
            while chunk := content.read(HASH_CHUNK):
                digest.update(chunk)
        hashes[name] = {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}
    return hashes


def _flush_to_disk(folder: Path, *, recursive: bool = True) -> None:
    """Flush a folder's entries, and with `recursive` the files and folders in it."""
    for path in [*(folder.rglob("*") if recursive else ()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
