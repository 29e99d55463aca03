"""A checkpoint as a plain model folder, proven equal to the model."""

import re
import shutil
from pathlib import Path

import torch

from pretrain_lib.data.text.tokenizer import load_tokenizer
from pretrain_lib.export.card import CARD, gather, write_card
from pretrain_lib.export.check import check_export
from pretrain_lib.models.hf import INDEX, load_pretrained, save_pretrained

WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    dtype: torch.dtype = torch.float32,
    scores: Path | None = None,
    max_shard_bytes: int | None = None,
) -> float:
    """Write the model and tokenizer of a checkpoint to `out` and return `check_export` of it.

    A model card says what is known of it; `scores` is a file of lm-eval's results that it shows.
    Files of weights hold at most `max_shard_bytes`, or a single larger tensor; default: one file.
    An earlier export in `out` is replaced, anything else there is refused. `out` appears only once
    transformers, in a process of its own, has read it as the same model and tokenizer.
    """
    out = out.resolve()
    if out.exists() and not _is_replaceable(out):
        raise ValueError(f"{out} holds something else than an export: give another folder")
    model = load_pretrained(checkpoint)
    known = gather(checkpoint, model, scores=scores)
    has_tokenizer = (checkpoint / "tokenizer.json").is_file()
    tokenizer = load_tokenizer(checkpoint) if has_tokenizer else None
    staging = out.with_name(out.name + ".tmp")
    if staging.exists():
        shutil.rmtree(staging)
    # What is compared has been through the dtype on disk, as the export has.
    model.to(dtype).float()
    files = {"dtype": dtype, "tokenizer": tokenizer}
    save_pretrained(model, staging, max_shard_bytes=max_shard_bytes, **files)
    write_card(staging, out.name, model, known)
    difference = check_export(model, staging, **files)
    if out.exists():
        shutil.rmtree(out)
    staging.rename(out)
    return difference


def _is_replaceable(out: Path) -> bool:
    """Whether a folder is empty, or holds what an export holds and nothing else."""
    exported = {"config.json", "generation_config.json", INDEX}
    exported |= {"tokenizer.json", "tokenizer_config.json", CARD}
    if not out.is_dir():
        return False
    found = {path.name for path in out.iterdir() if not WEIGHT_FILE.fullmatch(path.name)}
    weights = len(list(out.iterdir())) > len(found)
    return found <= exported and (weights or found != {CARD})  # which alone is somebody's own
