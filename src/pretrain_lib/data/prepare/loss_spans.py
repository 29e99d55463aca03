"""Which tokens count as targets, by the spans of a text that count.

A token counts if it stands for a character, or a part of one, that lies in a span. The end-of-text
token before a document stands for none: it counts only where the whole document does.
"""

import json
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import tokenizers

from pretrain_lib.data.text.equivalence import byte_ranks, word_pattern
from pretrain_lib.data.text.lost_text import UTF8_BYTES
from pretrain_lib.data.text.tokenizer import Tokenizer
from pretrain_lib.data.text.tokenizer_parts import spelled_bytes
from pretrain_lib.values import show

Spans = tuple[tuple[int, int], ...]


def check_spans_tokenizer(tokenizer: Tokenizer, field: str) -> None:
    """Raise ValueError unless the bytes that each token stands for are known."""
    settings = json.loads(tokenizer.backend.to_str())
    model, added = settings["model"], settings["added_tokens"]
    is_plain = settings["normalizer"] is None and word_pattern(settings["pre_tokenizer"])
    ranks = byte_ranks(settings) if is_plain and model["type"] == "BPE" else None
    marks = any(model.get(k) for k in ("continuing_subword_prefix", "end_of_word_suffix"))
    if ranks is None or marks or not all(bytes([byte]) in ranks for byte in UTF8_BYTES):
        raise ValueError(
            f"data.loss_spans={field!r} needs a tokenizer whose tokens are the bytes of the text, "
            f"one after the other: a byte-level BPE without a normalizer, such as GPT-2's, or one "
            f"that --train_tokenizer trains"
        )
    for token in added:
        text, strips = token["content"], token["lstrip"] or token["rstrip"]
        # The model's token of the same spelling stands for fewer bytes than the added one.
        in_model = not text.isascii() and text in model["vocab"]
        is_double = in_model and spelled_bytes().keys() >= {*text}
        if is_double or (strips and not token["special"]):
            raise ValueError(
                f"data.loss_spans={field!r} needs a tokenizer whose tokens are the bytes of the "
                f"text, but the added token {show(text)} strips white space (lstrip, rstrip) or is "
                f"one of the model's too; take such tokens out of its tokenizer.json"
            )


def mask_tokens(
    tokenizer: Tokenizer,
    tokens: np.ndarray,
    ends: np.ndarray,
    texts: Sequence[bytes],
    spans: Sequence[Spans | None],
) -> np.ndarray:
    """Return which of `tokens` count: bool. They are those of `texts`, document after document."""
    sizes = _token_bytes(tokenizer.backend)[tokens]
    mask = np.ones(len(tokens), dtype=bool)
    for start, end, text, text_spans in zip([0, *ends[:-1]], ends, texts, spans, strict=True):
        if text_spans is None:
            continue
        stops = np.cumsum(sizes[start + 1 : end])  # the first token is that of the end of text
        assert len(stops) and stops[-1] == len(text), "the tokens are not the bytes of the text"
        begins = np.append(0, stops[:-1])
        mask[start:end] = False
        for first, last in _in_bytes(text, text_spans):
            low = np.searchsorted(stops, first, side="right")
            high = np.searchsorted(begins, last, side="left")
            mask[start + 1 + low : start + 1 + high] |= first < last
    return mask


def _in_bytes(text: bytes, spans: Spans) -> Spans:
    """Return spans of characters as spans of bytes."""
    if text.isascii():
        return spans
    sizes = [len(character.encode()) for character in text.decode()]
    places = [0, *np.cumsum(sizes).tolist()]
    return tuple((places[first], places[last]) for first, last in spans)


@lru_cache(maxsize=2)
def _token_bytes(backend: tokenizers.Tokenizer) -> np.ndarray:
    """Return the number of bytes of each id: int64."""
    vocabulary = backend.get_vocab(with_added_tokens=True)
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    sizes = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for token, number in vocabulary.items():
        sizes[number] = len(token.encode()) if token in added else len(token)
    return sizes
