"""Whether the tokens of a text give back the text, by the kind of their tokenizer."""

import json

import tokenizers

from pretrain_lib.data.text.lost_text import missing_bytes
from pretrain_lib.data.text.tokenizer_parts import PREPEND_SPACE, REPLACE_SPACES, part_steps

# Steps that split a text and keep all of it, unless they remove what they split at.
SPLITS = {"ByteLevel", "Split", "Digits", "Punctuation", "Metaspace"}
RESTORE_SPACES = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
DECODE_BYTES = [RESTORE_SPACES, {"type": "ByteFallback"}, {"type": "Fuse"}]
STRIP_SPACE = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def gives_back_text(backend: tokenizers.Tokenizer) -> bool:
    """Return whether decoding gives back every text that was encoded, byte for byte.

    So does a BPE of bytes, of text in Unicode's form NFC if it normalizes to that. So does a BPE
    with byte fallback in the shape of SentencePiece, except that `▁` in a text becomes a space, and
    that with a Metaspace a space at the beginning of a document may be lost.
    """
    settings = json.loads(backend.to_str())
    model, words = settings["model"], part_steps(backend.pre_tokenizer)
    loses = (
        missing_bytes(backend) != []
        or any(model.get(k) for k in ("continuing_subword_prefix", "end_of_word_suffix"))
        or any(s["type"] not in SPLITS or s.get("behavior") == "Removed" for s in words)
        or any(t["lstrip"] or t["rstrip"] for t in settings["added_tokens"] if not t["special"])
    )
    if loses:
        return False
    decoder = settings["decoder"] or {}
    steps, decoding = part_steps(backend.normalizer), decoder.get("decoders", [decoder])
    spaces = [step for step in words if step["type"] == "Metaspace"]
    if not model.get("byte_fallback"):
        plain = not spaces and not any(s.get("add_prefix_space") for s in words)
        return plain and steps in ([], [{"type": "NFC"}]) and _is_byte_level(decoding)
    if spaces:
        begins = spaces[0]["prepend_scheme"] != "never"
        fits = steps == [] and len(spaces) == 1 and spaces[0]["replacement"] == "\u2581"
    else:
        begins = steps[:1] == [PREPEND_SPACE]
        fits = steps[begins:] == [REPLACE_SPACES]
    return fits and decoding == DECODE_BYTES + [STRIP_SPACE] * begins


def _is_byte_level(decoding: list[dict]) -> bool:
    return [step.get("type") for step in decoding] == ["ByteLevel"]
