"""The normalizer, pre-tokenizer and decoder of a tokenizer: settings, and what they imply."""

import json

import tokenizers

# The spaces of SentencePiece (Kudo and Richardson 2018), as steps of a normalizer.
REPLACE_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
PREPEND_SPACE = {"type": "Prepend", "prepend": "\u2581"}


def part_settings(part: object | None) -> dict | None:
    """Return the settings of a part of a tokenizer, as a `tokenizer.json` has them."""
    return None if part is None else json.loads(part.__getstate__())


def part_steps(part: object | None) -> list[dict]:
    """Return the settings of each step of a normalizer, pre-tokenizer or decoder, in order."""
    return [] if part is None else _flatten(part_settings(part))


def is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    """Return whether the model sees each byte of a text as one character."""
    steps = [*part_steps(backend.normalizer), *part_steps(backend.pre_tokenizer)]
    return any(step["type"] == "ByteLevel" for step in steps)


def spelled_bytes() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for.

    Printable bytes are represented by themselves, the others by the characters from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unprintable = [byte for byte in range(256) if byte not in printable]
    spelled = {chr(byte): byte for byte in printable}
    return spelled | {chr(256 + i): byte for i, byte in enumerate(unprintable)}


def _flatten(settings: dict) -> list[dict]:
    lists = (settings[n] for n in ("normalizers", "pretokenizers", "decoders") if n in settings)
    steps = next(lists, None)
    return [settings] if steps is None else [step for part in steps for step in _flatten(part)]
