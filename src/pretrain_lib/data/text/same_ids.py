"""Compare tokenizers by what decides the ids of a text, however their files spell it."""

import json

import tokenizers
from tokenizers import models

from pretrain_lib.data.text.lost_text import missing_bytes
from pretrain_lib.data.text.tokenizer_parts import part_steps

GPT2_STEPS = [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]
SCORE_DIGITS = 6  # a score that was parsed by another library may differ in its last digit


def has_same_ids(own: tokenizers.Tokenizer, other: tokenizers.Tokenizer) -> bool:
    """Return whether two tokenizers give the same ids to every text, special tokens left aside."""
    return set(differing_parts(own, other)) <= {"decoder"}


def differing_parts(own: tokenizers.Tokenizer, other: tokenizers.Tokenizer) -> list[str]:
    """Return the names of the parts in which two tokenizers differ, special tokens left aside."""
    special = {token.content for backend in (own, other) for token in _added(backend, special=True)}
    one, two = (
        {
            "normalizer": _steps(backend.normalizer),
            "pre-tokenizer": _steps(backend.pre_tokenizer),
            "added tokens": _numbered(backend),
            "model": _model(backend, special),
            "decoder": _decoder(backend.decoder),
        }
        for backend in (own, other)
    )
    return [name for name in one if one[name] != two[name]]


def has_gpt2_shape(backend: tokenizers.Tokenizer) -> bool:
    """Return whether a tokenizer has the words and bytes of GPT-2, and no more than merges."""
    model = backend.model
    marks = ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    return (
        backend.normalizer is None
        and _steps(backend.pre_tokenizer) == GPT2_STEPS
        and isinstance(model, models.BPE)
        and not any(getattr(model, mark) for mark in marks)
        and not missing_bytes(backend)
        and not _numbered(backend)
    )


def _steps(part: object | None) -> list[dict]:
    """Return the steps of a normalizer or pre-tokenizer, without what only moves offsets."""
    steps = [{k: v for k, v in s.items() if k != "trim_offsets"} for s in part_steps(part)]
    for step in steps:
        if step.get("strip_accents", False) is None:
            step["strip_accents"] = step["lowercase"]
    return steps


def _decoder(part: object | None) -> list[dict]:
    """Return the steps of a decoder; the settings of that of bytes change nothing."""
    steps = part_steps(part)
    return [{"type": s["type"]} if s["type"] == "ByteLevel" else s for s in steps]


def _added(backend: tokenizers.Tokenizer, *, special: bool) -> list[tokenizers.AddedToken]:
    added = backend.get_added_tokens_decoder().values()
    return [token for token in added if token.special == special]


def _numbered(backend: tokenizers.Tokenizer) -> dict[int, dict]:
    """Return the ordinary added tokens by their ids."""
    added = backend.get_added_tokens_decoder().items()
    return {number: token.__getstate__() for number, token in added if not token.special}


def _model(backend: tokenizers.Tokenizer, special: set[str]) -> dict:
    """Return what decides the ids that the model gives."""
    settings = {k: v for k, v in json.loads(backend.model.__getstate__()).items() if v}
    settings.pop("dropout", None)
    if missing_bytes(backend) == []:  # nothing is unknown
        settings.pop("unk_token", None)
        settings.pop("fuse_unk", None)
    vocabulary = settings.get("vocab", {})  # it may be empty
    if isinstance(vocabulary, list):
        settings["vocab"] = [(piece, round(score, SCORE_DIGITS)) for piece, score in vocabulary]
    else:
        settings["vocab"] = {k: v for k, v in vocabulary.items() if k not in special}
    return settings
