"""Reload an exported folder with transformers in a fresh process and compare it with the model."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from pretrain_lib.data.text.tokenizer import Tokenizer
from pretrain_lib.export.reload import LOGITS, RESULT, TEXTS, WEIGHTS, digest
from pretrain_lib.models.any_model import loaded_tensors, write_configuration
from pretrain_lib.models.interface import Model, unwrap
from pretrain_lib.models.modes import evaluation_mode

ROWS, LENGTH = 2, 128  # shape of the ids whose logits are compared
TEXTS_COMPARED = (
    "",
    " ",
    "Once upon a time, there were 12,345 words.",
    "  two leading spaces, a tab\t, trailing spaces  ",
    "lines\n\n  of code:\r\n\treturn x  # \n",
    "naïve café, Ελληνικά, русский, 日本語, العربية, 🙂👩‍👩‍👧",
    "It 's n't, don't; he 'll . <s></s>[INST] <unk>",
)


def check_export(
    model: Model,
    folder: Path | str,
    *,
    tokenizer: Tokenizer | None,
    dtype: torch.dtype = torch.float32,
) -> float:
    """Load a folder with transformers in a fresh process; return the difference of its logits.

    This is the maximum absolute difference relative to the largest logit, in fp32 on the CPU.
    `model` must hold the weights rounded to `dtype`. Raises ValueError naming everything that
    differs: a setting, a weight, a missing or unexpected tensor, logits by more than 1e-4, a
    special token, a part of the tokenizer, or the ids of a text.
    """
    with tempfile.TemporaryDirectory() as temporary:
        expected = Path(temporary)
        write_expected(unwrap(model), expected, tokenizer=tokenizer, dtype=dtype)
        result = _reload(folder, expected)
    if result["problems"]:
        problems = "; ".join(result["problems"])
        raise ValueError(f"{folder} does not load as the model that was exported: {problems}")
    return result["difference"]


def write_expected(
    model: Model, expected: Path, *, tokenizer: Tokenizer | None, dtype: torch.dtype
) -> None:
    """Write the expectations with which `reload` compares a folder."""
    write_configuration(model.config, expected, tokenizer=tokenizer, dtype=dtype)
    _write_weights(model, expected)
    if tokenizer is not None:
        texts = _describe_tokenizer(tokenizer, model.config.context_length)
        (expected / TEXTS).write_text(json.dumps(texts), encoding="utf-8")


def _reload(folder: Path, expected: Path) -> dict:
    run = subprocess.run(  # -P: not with what lies in the working directory
        [sys.executable, "-P", "-m", "pretrain_lib.export.reload", folder, expected],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    if run.returncode:
        reason = (run.stderr.strip() or f"exit code {run.returncode}").splitlines()[-1]
        raise ValueError(f"the process that loads {folder} again has failed: {reason}")
    return json.loads((expected / RESULT).read_text(encoding="utf-8"))


def _write_weights(model: Model, expected: Path) -> None:
    """Write the digests of all tensors, and the logits of random ids."""
    digests = {name: digest(tensor) for name, tensor in loaded_tensors(model).items()}
    (expected / WEIGHTS).write_text(json.dumps(digests), encoding="utf-8")
    length = min(LENGTH, model.config.context_length)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocabulary_size, (ROWS, length), generator=generator)
    with torch.no_grad(), evaluation_mode(model):
        logits = model(ids.to(model.head_weight.device)).float().cpu()
    save_file({"ids": ids, "logits": logits.contiguous()}, expected / LOGITS)


def _describe_tokenizer(tokenizer: Tokenizer, context_length: int) -> dict:
    """Return a tokenizer's attributes, and `(text, plain ids, parsed ids, decoded)` of test texts.

    Plain ids treat special tokens in a text as text, as far as `tokenizers` does; parsed ids, as
    special tokens.
    """
    end = tokenizer.end_of_text
    texts = (*TEXTS_COMPARED, end, f"a{end}b {end}\n{end}{end}", f"{end} c")
    backend = tokenizer.backend
    backend.encode_special_tokens = True
    plain = [backend.encode(text, add_special_tokens=False).ids for text in texts]
    backend.encode_special_tokens = False
    parsed = [backend.encode(text, add_special_tokens=False).ids for text in texts]
    values = {f"{kind}_token": end for kind in ("bos", "eos", "unk")}
    values |= {f"{kind}_token_id": tokenizer.end_of_text_id for kind in ("bos", "eos", "unk")}
    values |= {"length": backend.get_vocab_size(with_added_tokens=True)}
    values |= {"model_max_length": context_length}
    decoded = [tokenizer.decode(ids) for ids in plain]
    return {"values": values, "texts": list(zip(texts, plain, parsed, decoded, strict=True))}
