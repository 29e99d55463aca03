"""Which encoders give the ids of a tokenizer: `tiktoken` by proof, `gigatoken` by shape.

The merges of a `tiktoken` encoding are proven to be those of the tokenizer. `gigatoken` applies the
tokenizer's own merge list; its shapes of tokenizers are known to be split alike in both libraries.
"""

import json
import math
import re
from functools import cache

import tiktoken

from pretrain_lib.data.text.tokenizer import Tokenizer
from pretrain_lib.data.text.tokenizer_parts import PREPEND_SPACE, REPLACE_SPACES, spelled_bytes

# The default pattern of the ByteLevel pre-tokenizer of `tokenizers` (GPT-2, Radford et al. 2019).
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Patterns by which both libraries split every text alike. Other patterns may differ: `^` and `$`
# mean different things in their regex dialects, and `tiktoken` drops text outside of all matches.
KNOWN_WORDS = {
    GPT2_WORDS,
    GPT2_WORDS.replace("'(?:[sdmt]|ll|ve|re)", "'s|'t|'re|'ve|'m|'ll|'d"),
    GPT4_WORDS,
    GPT4_WORDS.replace(r"\p{N}{1,3}", r"\p{N}{1,2}"),
    GPT4_WORDS.replace(r"\p{N}{1,3}", r"\p{N}"),
}
# The spaces of SentencePiece (Kudo and Richardson 2018), as normalizers and as pre-tokenizers.
SPACE_NORMALIZERS = ({"type": "Sequence", "normalizers": [PREPEND_SPACE, REPLACE_SPACES]},)
METASPACES = tuple(
    {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}
    for scheme in ("first", "always", "never")
)
# Letters and digits to `gigatoken` 0.10 (Unicode 17) but unassigned to `tokenizers` (Unicode 16),
# so that they split words otherwise. Documents that hold one are left to `tokenizers`.
NEW_CHARACTERS = (  # of a class in a regular expression
    "\u088f\u0c5c\u0cdc\ua7ce-\ua7cf\ua7d2\ua7d4\ua7f1\U00010940-\U00010959"
    "\U00010ec5-\U00010ec7\U00011db0-\U00011ddb\U00011de0-\U00011de9\U00016ea0-\U00016eb8"
    "\U00016ebb-\U00016ed3\U00016ff2-\U00016ff6\U000187f8-\U000187ff\U00018d09-\U00018d1e"
    "\U00018d80-\U00018df2\U0001e6c0-\U0001e6de\U0001e6e0-\U0001e6e2\U0001e6e4-\U0001e6e5"
    "\U0001e6e7-\U0001e6ed\U0001e6f0-\U0001e6f4\U0001e6fe-\U0001e6ff\U0002b73a-\U0002b73f"
    "\U0002cea2-\U0002cead\U000323b0-\U00033479"
)
# Texts on which encoders are compared besides the sample.
HARD_TEXTS = (
    "",
    "<|endoftext|>",
    "a<|endoftext|> b </s><s> <|end_of_text|>",
    "a" * 100,
    "a" * 5000,
    " " * 1000,
    "\n" * 1000,
    " \t\n\r\n  \x0b\x0c  x\n \n  y",
    "\u3000 \u3000a\u3000\u2028b\u2029\x85c\x85 d\xa0 e",
    "\x00a\x00\x00 \x7f",
    "a\r\nb\r\n\r\n c\r",
    "\xe9 e\u0301 \xc5 A\u030a \uf900 \u1112\u1161\u11ab \u0344\u0345",
    "\U0001f469\u200d\U0001f680 \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\u0661\u0662\u0663\u0664 1 12 123 1234 12345678 \u096a\u096b \xb2\xbd\u2167",
    "don\u2019t I\u2019ll don't I'll we'RE 'S x'S '\u017ft 'x don'tt I'Ve 'l",
    "!?... --- (a) [b] {c}; /* d */ \u4f60\u597d\u3002 \u2581a\u2581 b",
    "\ufeffa \u200b\xad \ufffd \ue000 \u0378",
)


@cache
def _new_bytes() -> list[re.Pattern[bytes]]:
    """Return patterns of the UTF-8 bytes of `NEW_CHARACTERS`, one for each first byte.

    A pattern that begins with one byte is searched at the speed of memory, a class of characters
    byte by byte.
    """
    endings: dict[bytes, bytes] = {}  # the class of the last byte, by the bytes before it
    for first, last in re.findall("(.)(?:-(.))?", NEW_CHARACTERS):
        low, high = ord(first), ord(last or first)
        for block in range(low // 64, high // 64 + 1):  # characters that differ in the last byte
            ends = max(low, 64 * block), min(high, 64 * block + 63)
            head = chr(ends[0]).encode()[:-1]
            last_bytes = b"-".join(_spell(chr(end).encode()[-1:]) for end in ends)
            endings[head] = endings.get(head, b"") + last_bytes
    patterns = []
    for first in sorted({head[:1] for head in endings}):
        heads = [head for head in endings if head.startswith(first)]
        seconds = b"".join(_spell(second) for second in sorted({head[1:2] for head in heads}))
        tails = b"|".join(b"%s[%s]" % (_spell(head[1:]), endings[head]) for head in heads)
        patterns.append(re.compile(b"%s(?=[%s])(?:%s)" % (_spell(first), seconds, tails)))
    return patterns


def _spell(raw: bytes) -> bytes:
    """Return bytes as a regular expression spells them."""
    return b"".join(b"\\x%02x" % value for value in raw)


def has_new_characters(text: bytes) -> bool:
    """Return whether a text has characters that `gigatoken` and `tokenizers` see otherwise."""
    return not text.isascii() and any(pattern.search(text) for pattern in _new_bytes())


def has_gigatoken_shape(tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer is of a kind that `gigatoken` encodes as `tokenizers` does.

    These are BPEs of bytes (GPT-2, Llama 3 and others) or with byte fallback (SentencePiece), whose
    added tokens are all special and whose text is not normalized, save for the spaces.
    """
    settings = json.loads(tokenizer.backend.to_str())
    model = settings["model"]
    if not _is_plain(settings):
        return False
    if not model.get("byte_fallback"):
        steps, ranks = settings["pre_tokenizer"], byte_ranks(settings)
        return settings["normalizer"] is None and None not in (word_pattern(steps), ranks)
    fallback = all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))
    normalizer, pre_tokenizer = settings["normalizer"], settings["pre_tokenizer"]
    return (
        fallback
        and not model.get("ignore_merges")
        and (
            (pre_tokenizer is None and normalizer in SPACE_NORMALIZERS)
            or (pre_tokenizer in METASPACES and normalizer is None)
        )
    )


def strip_added_tokens(tokenizer: Tokenizer) -> str:
    """Return a tokenizer's JSON without added tokens: their spelling in a text is plain text."""
    settings = json.loads(tokenizer.plain.to_str())
    return json.dumps(settings | {"added_tokens": [], "post_processor": None})


def _is_plain(settings: dict) -> bool:
    """Return whether a tokenizer is a BPE without marks, dropout and added ordinary tokens."""
    model = settings["model"]
    return (
        model["type"] == "BPE"
        and not model.get("dropout")
        and not any(model.get(k) for k in ("continuing_subword_prefix", "end_of_word_suffix"))
        and all(token["special"] for token in settings["added_tokens"])
    )


def as_tiktoken(tokenizer: Tokenizer) -> tiktoken.Encoding | None:
    """Convert a BPE to `tiktoken`, or return None if it cannot be proven equivalent."""
    settings = json.loads(tokenizer.backend.to_str())
    model = settings["model"]
    plain = (
        _is_plain(settings)
        and not model.get("byte_fallback")
        and settings["normalizer"] is None
        and word_pattern(settings["pre_tokenizer"]) is not None
    )
    if not plain:
        return None
    ranks = byte_ranks(settings)
    if ranks is None or not _makes_the_same_merges(model, ranks):
        return None
    return build_tiktoken(tokenizer, settings)


def build_tiktoken(tokenizer: Tokenizer, settings: dict) -> tiktoken.Encoding:
    """Return the `tiktoken` encoding of a tokenizer, unproven; `settings` is the parsed JSON."""
    pattern, ranks = word_pattern(settings["pre_tokenizer"]), byte_ranks(settings)
    # Without any special token tiktoken searches for one at every character, at half the speed. The
    # token is still plain text in a document, since `encode` allows no special tokens.
    special = {tokenizer.end_of_text: tokenizer.end_of_text_id}
    return tiktoken.Encoding("own", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def word_pattern(pre_tokenizer: dict | None) -> str | None:
    """Return the split pattern of a byte-level pre-tokenizer, None if unknown or another kind."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {"type": None}])
    last = steps[-1]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if len(steps) == 1 and last["use_regex"]:
        return GPT2_WORDS
    split = steps[0]
    is_pair = len(steps) == 2 and split["type"] == "Split" and not last["use_regex"]
    if is_pair and split["behavior"] == "Isolated" and not split["invert"]:
        pattern = split["pattern"].get("Regex")
        return pattern if pattern in KNOWN_WORDS else None
    return None


def byte_ranks(settings: dict) -> dict[bytes, int] | None:
    """Return the id of each token by its bytes; None if a token is not made of byte characters."""
    names = {token["content"] for token in settings["added_tokens"]}
    spelled = spelled_bytes()
    try:
        return {
            bytes(spelled[character] for character in token): number
            for token, number in settings["model"]["vocab"].items()
            if token not in names
        }
    except KeyError:
        return None


def _makes_the_same_merges(model: dict, ranks: dict[bytes, int]) -> bool:
    """Return whether merging by token rank (tiktoken) equals merging by merge list (tokenizers).

    Both are equal if the list has exactly one merge for each multi-byte token, in order of token
    ids, and each merge is the last one that ranks make when applied to the token's bytes alone. The
    context does not matter: the merges within a token's span are those of its bytes alone.
    """
    spelled = spelled_bytes()
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    merges = [tuple(bytes(spelled[c] for c in part) for part in pair) for pair in pairs]
    results = [ranks.get(left + right, -1) for left, right in merges]
    singles = [bytes([byte]) for byte in range(256)]
    return (
        all(single in ranks for single in singles)
        and len(ranks) == len(merges) + 256
        and all(a < b for a, b in zip([-1, *results], results, strict=False))
        and all(_last_merge(left + right, ranks) == (left, right) for left, right in merges)
    )


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, ...]:
    """Return the two parts left before the last merge when a token's bytes are merged by rank."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, math.inf) for a, b in zip(parts, parts[1:], strict=False)]
        best = min(range(len(joined)), key=joined.__getitem__)
        if joined[best] >= ranks[token]:
            return ()
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return tuple(parts)
