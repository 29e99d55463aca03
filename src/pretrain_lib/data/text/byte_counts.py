"""Count the bytes of text that tokens stand for, without decoding the text.

A sum over tokens, so that the counts of the parts of a text add up to that of the whole, wherever
it is cut: a part may begin or end within a character, which decoding would replace by U+FFFD.
"""

import json
import re
from collections.abc import Callable

import numpy as np
import tokenizers

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Decoders that turn each token into text by itself, except for what they strip from the first one.
TOKENWISE = {"Metaspace", "WordPiece", "Replace", "ByteFallback", "Fuse", "Strip"}
ANCHOR = "a"  # a token that no decoder changes


def count_bytes(
    backend: tokenizers.Tokenizer, ids: np.ndarray, *, before: int, end_of_text_id: int
) -> int:
    """Return the UTF-8 size in bytes of the text of `ids`; special tokens have none.

    A document begins behind `end_of_text_id`; `before` is the id of the token before `ids`.
    """
    decoder = json.loads(backend.to_str())["decoder"]
    added = backend.get_added_tokens_decoder()
    special = [number for number, token in added.items() if token.special]
    is_end = ids == end_of_text_id
    if (size := _token_size(decoder, backend)) is None:
        return _decoded_bytes(backend, ids, np.flatnonzero(is_end))
    has_text = ~np.isin(ids, special)
    # The first token with text of each document: those before it may be special.
    document = (np.cumsum(is_end) + (before == end_of_text_id))[has_text]
    is_first = np.diff(document, prepend=0) > 0
    total = 0
    for first in (True, False):
        numbers, counts = np.unique(ids[has_text][is_first == first], return_counts=True)
        tokens = (backend.id_to_token(int(number)) for number in numbers)
        sizes = [0 if token is None else size(token, first) for token in tokens]
        total += int(np.dot(sizes, counts)) if sizes else 0
    return total


def _token_size(
    decoder: dict | None, backend: tokenizers.Tokenizer
) -> Callable[[str, bool], int] | None:
    """Return the function of a token, and of whether it is a document's first, that sizes it.

    None if what a token decodes to depends on the tokens around it.
    """
    if decoder is None:  # tokens are joined by spaces
        return lambda token, first: len(token.encode()) + (not first)
    steps = decoder.get("decoders", [decoder])
    kinds = {step["type"] for step in steps}
    if kinds == {"ByteLevel"}:
        alphabet = set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        added = {token.content for token in backend.get_added_tokens_decoder().values()}
        return lambda token, first: (  # noqa: ARG005 (the first is no exception)
            len(token) if alphabet.issuperset(token) and token not in added else len(token.encode())
        )
    stripped = [(step["start"], step["stop"]) for step in steps if step["type"] == "Strip"]
    replaced = [step["pattern"].get("String", "") for step in steps if step["type"] == "Replace"]
    if kinds <= TOKENWISE and set(stripped) <= {(1, 0), (0, 0)} and all(map(_is_one, replaced)):
        has_bytes = "ByteFallback" in kinds
        return lambda token, first: _tokenwise_size(backend, token, first, has_bytes=has_bytes)
    return None


def _is_one(pattern: str) -> bool:
    return len(pattern) == 1


def _tokenwise_size(
    backend: tokenizers.Tokenizer, token: str, first: bool, *, has_bytes: bool
) -> int:
    if has_bytes and (byte := BYTE.fullmatch(token)) and int(byte[1], 16) >= 0x80:
        return 1  # a part of a character
    tokens = [token, ANCHOR] if first else [ANCHOR, token]
    overhead = len(backend.decoder.decode([ANCHOR, ANCHOR]).encode()) - 1 if first else 1
    return len(backend.decoder.decode(tokens).encode()) - overhead


def _decoded_bytes(backend: tokenizers.Tokenizer, ids: np.ndarray, starts: np.ndarray) -> int:
    documents = [part.tolist() for part in np.split(ids, starts)]
    texts = backend.decode_batch(documents, skip_special_tokens=True)
    return sum(len(text.encode()) for text in texts)
