"""A checkpoint as a plain model folder, proven equal to the model. Floor 7."""

import shutil
from pathlib import Path

import torch

from pretrain_lib.card import CARD, gather, write_card
from pretrain_lib.data.tokenizer import load_tokenizer
from pretrain_lib.models.hf import check_parity, load_pretrained, save_pretrained


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    dtype: torch.dtype = torch.float32,
    scores: Path | None = None,
) -> float:
    """Write the model and tokenizer of a checkpoint to `out` and return `check_parity` of it.

    A model card says what is known of it; `scores` is a file of lm-eval's results that it shows.
    An earlier export in `out` is replaced, anything else there is refused. `out` appears only once
    transformers has loaded it and computed the model's logits.
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
    save_pretrained(model, staging, tokenizer=tokenizer, dtype=dtype)
    write_card(staging, out.name, model, known)
    # What is compared has been through the dtype on disk, as the export has.
    difference = check_parity(model.to(dtype).float(), staging)
    if out.exists():
        shutil.rmtree(out)
    staging.rename(out)
    return difference


def _is_replaceable(out: Path) -> bool:
    """Whether a folder is empty, or holds what an export holds and nothing else."""
    exported = {"config.json", "generation_config.json", "model.safetensors"}
    exported |= {"tokenizer.json", "tokenizer_config.json", CARD}
    if not out.is_dir():
        return False
    found = {path.name for path in out.iterdir()}
    return found <= exported and found != {CARD}  # which alone is somebody's own
