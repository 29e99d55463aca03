"""Load a model folder with transformers alone and compare it with the expectation.

    python -m pretrain_lib.export.reload FOLDER EXPECTED

`EXPECTED` is a folder written by `export.check`; the outcome is written to `result.json` in it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import tokenizers
import torch
import xxhash
from safetensors.torch import load_file

from pretrain_lib.data.text.same_ids import differing_parts

SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
WEIGHTS, LOGITS, TEXTS, RESULT = "weights.json", "logits.safetensors", "texts.json", "result.json"
TOLERANCE = 1e-4  # relative to the largest logit, in fp32
SHOWN = 60  # how many characters of a differing value are shown
NAMED = 3  # how many differing tensors are named


def main() -> None:
    """Compare the folder given as first argument with the expectation given as second."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder, expected = (Path(argument) for argument in sys.argv[1:])
    problems, difference = find_problems(folder, expected)
    (expected / RESULT).write_text(
        json.dumps({"problems": problems, "difference": difference}), encoding="utf-8"
    )


def find_problems(folder: Path, expected: Path) -> tuple[list[str], float | None]:
    """Return how `folder` differs from the expectation, and the difference of the logits.

    The latter is the maximum absolute difference relative to the largest logit, None if the
    logits could not be compared.
    """
    problems = [p for name in SETTINGS for p in _compare_settings(folder / name, expected / name)]
    faults, difference = _compare_model(folder, expected)
    problems += faults
    if (expected / TEXTS).is_file():
        problems += _compare_tokenizer(folder, expected)
    return problems, difference


def _compare_settings(path: Path, expected: Path) -> list[str]:
    """Return the fields that differ between two JSON files."""
    if not expected.is_file() and not path.is_file():
        return []
    if not expected.is_file() or not path.is_file():
        return [f"{path.name} {'is unexpected' if path.is_file() else 'is missing'}"]
    actual, wanted = _read(path), _read(expected)
    return [
        f"{path.name}: {field} is {_show(actual, field)}, not {_show(wanted, field)}"
        for field in sorted(actual.keys() | wanted.keys())
        if field not in actual or field not in wanted or actual[field] != wanted[field]
    ]


def _compare_model(folder: Path, expected: Path) -> tuple[list[str], float | None]:
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # any type
        return [f"transformers does not load the model: {_line(error)}"], None
    problems = [
        f"transformers reports {kind.replace('_', ' ')}: {sorted(map(str, names))}"
        for kind, names in report.items()
        if names
    ]
    problems += _compare_weights(model.state_dict(), _read(expected / WEIGHTS))
    config = _read(expected / SETTINGS[0])
    for field in ("vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id"):
        if field not in config:  # not every class has all
            continue
        if (found := getattr(model.config, field)) != config[field]:
            problems.append(f"the loaded model has {field}={found}, not {config[field]}")
    found, difference = _compare_logits(model, load_file(expected / LOGITS))
    return problems + found, difference


def _compare_weights(tensors: dict[str, torch.Tensor], digests: dict[str, str]) -> list[str]:
    differ = [n for n, d in digests.items() if n not in tensors or digest(tensors[n]) != d]
    remainder = f" and {len(differ) - NAMED} more" if len(differ) > NAMED else ""
    names = f"{', '.join(differ[:NAMED])}{remainder}"
    return [f"the weights {names} differ from the model's"] if differ else []


def digest(tensor: torch.Tensor) -> str:
    """Return the xxh3_128 of a tensor's values in fp32."""
    return xxhash.xxh3_128_hexdigest(tensor.detach().float().cpu().contiguous().numpy())


@torch.no_grad()
def _compare_logits(
    model: Any, expected: dict[str, torch.Tensor]
) -> tuple[list[str], float | None]:
    try:
        # Without the cache, which in some families does not work, or changes what they compute.
        logits = model.eval()(expected["ids"], use_cache=False).logits
    except Exception as error:  # such as an id beyond a truncated embedding
        return [f"the loaded model does not compute logits: {_line(error)}"], None
    wanted = expected["logits"]
    if logits.shape != wanted.shape:
        shapes = f"{tuple(logits.shape)}, not {tuple(wanted.shape)}"
        return [f"the logits under transformers have the shape {shapes}"], None
    difference = float((logits - wanted).abs().max() / wanted.abs().max())
    if difference <= TOLERANCE:
        return [], difference
    return [
        f"the logits under transformers differ from the model's by {difference:.2e} of the "
        f"largest, above {TOLERANCE}"
    ], difference


def _compare_tokenizer(folder: Path, wanted: Path) -> list[str]:
    """Compare special tokens, vocabulary size, parts, and the ids of texts and their decoding."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        return [f"transformers does not load the tokenizer: {_line(error)}"]
    expected = _read(wanted / TEXTS)
    values = expected["values"]
    actual = {name: getattr(tokenizer, name) for name in values if name != "length"}
    actual["length"] = len(tokenizer)
    problems = [
        f"the loaded tokenizer has {name}={actual[name]}, not {values[name]}"
        for name in values
        if actual[name] != values[name]
    ]
    original = tokenizers.Tokenizer.from_file(str(wanted / SETTINGS[-1]))
    for part in differing_parts(original, tokenizer.backend_tokenizer):
        problems.append(f"the loaded tokenizer has another {part}")
    for text, plain, parsed, decoded in expected["texts"]:
        # First as lm-eval and others call the tokenizer, then as documents are tokenized here.
        ids = {"": tokenizer(text)["input_ids"]}
        split = tokenizer(text, split_special_tokens=True, add_special_tokens=False)
        ids[", special tokens as text"] = split["input_ids"]
        for (how, theirs), ours in zip(ids.items(), (parsed, plain), strict=True):
            if theirs != ours:
                problems.append(f"the text {text!r} has the ids {theirs}{how}, not {ours}")
        if tokenizer.decode(plain) != decoded:
            problems.append(f"the ids of {text!r} are decoded as {tokenizer.decode(plain)!r}")
    return problems


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _show(values: dict, field: str) -> str:
    text = json.dumps(values[field]) if field in values else "missing"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


if __name__ == "__main__":
    main()
