"""Refuse tokenizers that lose text: they drop characters for which they have no token.

A tokenizer with an unknown token replaces such text visibly, which is its own doing.
"""

from itertools import product
from pathlib import Path

import tokenizers
from tokenizers import models

from pretrain_lib.data.text.tokenizer_parts import is_byte_level, spelled_bytes

# Those that occur in UTF-8.
UTF8_BYTES = [byte for byte in range(0xF5) if byte not in (0xC0, 0xC1)]
UNKNOWN = "\U0010fffd"  # a character of private use, which no vocabulary holds


def check_keeps_text(backend: tokenizers.Tokenizer, name: str | Path) -> None:
    """Raise ValueError for a tokenizer that drops, or stops at, what its vocabulary lacks."""
    missing = missing_bytes(backend)
    if missing == [] or _marks_unknown(backend.model):
        return
    lack = "for every character"
    if missing:
        lack = f"for {len(missing)} of the bytes of UTF-8, such as {missing[0]:#04x},"
    remedy = "name one of its tokens as the unknown token of the model in its tokenizer.json"
    if is_byte_level(backend):
        remedy = f"train it with initial_alphabet=ByteLevel.alphabet(), or {remedy}"
    raise ValueError(
        f"data.tokenizer={name} would lose text: it has no ordinary token {lack} and no unknown "
        f"token in its vocabulary; {remedy}"
    )


def missing_bytes(backend: tokenizers.Tokenizer) -> list[int] | None:
    """Return the bytes without a token of their own; None if tokens do not stand for bytes."""
    model = backend.model
    if is_byte_level(backend) and isinstance(model, models.BPE | models.Unigram):
        # A byte may be spelled otherwise at the start and at the end of a word.
        before = {"", getattr(model, "continuing_subword_prefix", None) or ""}
        behind = {"", getattr(model, "end_of_word_suffix", None) or ""}
        spelled = {byte: character for character, byte in spelled_bytes().items()}
        forms = {b: [a + spelled[b] + z for a, z in product(before, behind)] for b in UTF8_BYTES}
        return [byte for byte, own in forms.items() if None in map(model.token_to_id, own)]
    if isinstance(model, models.BPE) and model.byte_fallback:
        own = [byte for byte in range(0x80) if model.token_to_id(chr(byte)) is not None]
        others = [byte for byte in UTF8_BYTES if byte not in own]
        return [byte for byte in others if model.token_to_id(f"<0x{byte:02X}>") is None]
    return None


def _marks_unknown(model: models.Model) -> bool:
    """Return whether a model has a token for what it does not know."""
    if isinstance(model, models.BPE):
        return model.unk_token is not None and model.token_to_id(model.unk_token) is not None
    try:
        return bool(model.tokenize(UNKNOWN))
    except Exception:  # a bare one: it has no such token
        return False
