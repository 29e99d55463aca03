"""Export a checkpoint as a model folder and verify that it equals the model."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from pretrain_lib.checkpoint.folders import MANIFEST, still_there
from pretrain_lib.data.text.tokenizer import load_tokenizer
from pretrain_lib.export.card import CARD, gather, run_of, write_card
from pretrain_lib.export.check import check_export
from pretrain_lib.export.reload import SETTINGS
from pretrain_lib.files.outputs import check_folder
from pretrain_lib.files.writes import flush, flush_to_disk, naming, staged
from pretrain_lib.models.any_model import check_saving, load_pretrained, save_pretrained
from pretrain_lib.models.interface import saved_tensors
from pretrain_lib.models.weight_files import INDEX, SHARDS, WEIGHTS
from pretrain_lib.tensors.files import stored_dtype

PICTURE = "curves.png"
VARYING = (WEIGHTS, SHARDS, INDEX, *SETTINGS[2:], PICTURE)  # patterns: what not every export has
REPLACED = "pretrain_lib-old"  # ending of the hidden folder of an export that is replaced
WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    dtype: torch.dtype = torch.float32,
    scores: Path | None = None,
    draw: Callable[[Path, int], object] | None = None,
    max_shard_bytes: int | None = None,
) -> float:
    """Export the model and tokenizer of a checkpoint to `out`; return the result of `check_export`.

    The export has a model card, titled by the run's name; `scores` is a file of lm-eval results to
    show in it, `draw(path, step)` writes a PNG of the run's curves up to a step. Weight files hold
    at most `max_shard_bytes`, or a single larger tensor (default: one file). An earlier export in
    `out` is replaced. `out` appears only after a fresh process has loaded it with transformers as
    the same model and tokenizer. Raises ValueError if `out` holds anything but an export, if the
    check fails, or if a run removes the checkpoint while it is read.
    """
    check_saving(dtype=dtype, max_shard_bytes=max_shard_bytes)
    check_export_folder(out, checkpoint)
    out = out.resolve()
    with still_there(checkpoint):
        model = load_pretrained(checkpoint, by_transformers=is_by_transformers(checkpoint))
        known = gather(checkpoint, model, scores=scores)
        has_tokenizer = (checkpoint / "tokenizer.json").is_file()
        tokenizer = load_tokenizer(checkpoint) if has_tokenizer else None
    staging, replaced = staged(out), out.with_name(f".{out.name}.{REPLACED}")
    _clean_up(out, staging, replaced)
    # Round the weights to the dtype on disk, so that the comparison is with the exported values.
    for tensor in saved_tensors(model).values():
        tensor.copy_(tensor.to(stored_dtype(tensor, dtype)))
    files = {"dtype": dtype, "tokenizer": tokenizer}
    run = run_of(checkpoint)
    try:
        with naming(out):
            save_pretrained(model, staging, max_shard_bytes=max_shard_bytes, **files)
            is_drawn = draw is not None and any(row["kind"] == "train" for row in known.rows)
            if is_drawn:
                draw(staging / PICTURE, known.state["step"])
            shown = PICTURE if is_drawn else None
            write_card(staging, out.name if run is None else run.name, model, known, picture=shown)
        difference = check_export(model, staging, **files)
        flush_to_disk(staging)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)  # or a full disk would stay full
        raise
    if out.exists():
        out.rename(replaced)
    staging.rename(out)
    flush(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return difference


def _clean_up(out: Path, staging: Path, replaced: Path) -> None:
    """Undo what an export that was killed has left."""
    if replaced.exists() and not out.exists():  # it was killed between its renames
        replaced.rename(out)
    for path in (staging, replaced):
        shutil.rmtree(path, ignore_errors=True)


def is_by_transformers(checkpoint: Path) -> bool:
    """Return whether a checkpoint is of a run whose model was a class of transformers."""
    path = checkpoint / MANIFEST
    if not path.is_file():
        return False
    # The manifest of a checkpoint that a loop of one's own has saved may be empty.
    settings = json.loads(path.read_text(encoding="utf-8")).get("config", {})
    return "config" in settings.get("model", {})


def check_export_folder(out: Path, checkpoint: Path) -> None:
    """Raise ValueError unless `out` is new, empty or another export, which will be replaced."""
    check_folder(out, named="out=", kind="an export", is_ours=_is_replaceable, replaced=True)
    if out.resolve() == checkpoint.resolve():
        raise ValueError(f"out={out} is the folder that is exported: give another one")


def _is_replaceable(out: Path) -> bool:
    """Return whether a folder is empty or holds only the files of an export."""
    exported = {*SETTINGS, INDEX, CARD, PICTURE}
    if not out.is_dir():
        return False
    names = {path.name for path in out.iterdir() if not WEIGHT_FILE.fullmatch(path.name)}
    weights = len(list(out.iterdir())) > len(names)
    is_bare = bool(names) and names <= {CARD, PICTURE}  # a README.md alone is not an export
    return names <= exported and (weights or not is_bare)
