"""Tokenize documents with `tiktoken` where it gives the same ids as the tokenizer.

`tiktoken` is two to four times as fast as `tokenizers`. It is used if three conditions hold: the
tokenizer is a byte-level BPE whose merges are proven to be those that `tiktoken` makes, its
pre-tokenizer pattern is known to match alike in both libraries, and both give equal ids on a
sample.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
import tiktoken

from pretrain_lib.data.text.formats import CUT, Document
from pretrain_lib.data.text.tokenizer import Tokenizer, load_tokenizer
from pretrain_lib.data.tokens.shards import token_dtype

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
PIECE_CHARACTERS = 2**15  # longer documents are tokenized in pieces of this size
BATCH_CHARACTERS = 2**20  # size of a batch of documents for `tokenizers`
SAMPLE_PIECE_CHARACTERS = 64
# Tested besides the sample, which may have no place to cut.
CUT_PROBE = "One of the 12 words, in 1999 \n\nor the other\n  of the 30\n" * 40
CUT_TEXT = re.compile(CUT.pattern.decode())


@dataclass(frozen=True)
class Encoder:
    """Tokenizes documents into ids of the on-disk dtype."""

    tokenizer: Tokenizer
    fast: tiktoken.Encoding | None
    """The equivalent `tiktoken` encoding, or None to use `tokenizers`."""
    cuts_text: bool
    """Whether tokenizing a text in pieces, split at matches of `CUT`, gives the same ids."""

    @cached_property
    def dtype(self) -> np.dtype:
        """The dtype of ids on disk."""
        return token_dtype(self.tokenizer.vocabulary_size)

    def encode(self, documents: Iterable[Document]) -> Iterator[np.ndarray]:
        """Yield the ids of each document; the beginning of a document gets an end-of-text id."""
        if self.fast is None:
            for batch in _batches(documents):
                yield from self._encode_batch(batch)
            return
        begin = np.array([self.tokenizer.end_of_text_id], dtype=self.dtype)
        for document in documents:
            parts = [begin] if document.begins else []
            for piece in self._pieces(document.text):
                parts.append(self._encode_fast(piece))
            yield np.concatenate(parts, dtype=self.dtype, casting="unsafe")

    def _encode_fast(self, text: str) -> np.ndarray:
        try:
            return self.fast.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # its regex engine overflows on a long run of white space
            return self.tokenizer.encode_documents([text])[0][1:]

    def _encode_batch(self, batch: Sequence[Document]) -> Iterator[np.ndarray]:
        if len(batch) > 1:
            texts = [document.text for document in batch]
            for document, ids in zip(batch, self.tokenizer.encode_documents(texts), strict=True):
                yield (ids if document.begins else ids[1:]).astype(self.dtype)
            return
        parts = [np.array([self.tokenizer.end_of_text_id] * batch[0].begins, dtype=self.dtype)]
        for piece in self._pieces(batch[0].text):
            parts.append(self.tokenizer.encode_documents([piece])[0][1:].astype(self.dtype))
        yield np.concatenate(parts)

    def _pieces(self, text: str) -> Iterator[str]:
        return cut_text(text, PIECE_CHARACTERS if self.cuts_text else len(text))


def cut_text(text: str, size: int) -> Iterator[str]:
    """Split a text into pieces of at least `size` characters, at places that change no token."""
    start = 0
    while len(text) - start > size and (cut := CUT_TEXT.search(text, start + size - 1)):
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


def choose_encoder(tokenizer: Tokenizer, sample: Sequence[str]) -> Encoder:
    """Return the fastest encoder that gives the ids of `tokenizer`, checked on `sample`."""
    fast, expected = _as_tiktoken(tokenizer), [tokenizer.encode(text) for text in sample]
    encoder = Encoder(tokenizer, fast, cuts_text=False)
    if fast is not None:
        found = encoder.encode(Document(text) for text in sample)
        if any(ids[1:].tolist() != own for ids, own in zip(found, expected, strict=True)):
            encoder = Encoder(tokenizer, None, cuts_text=False)
    return Encoder(tokenizer, encoder.fast, _can_cut(tokenizer, [*sample, CUT_PROBE]))


def _can_cut(tokenizer: Tokenizer, sample: Sequence[str]) -> bool:
    for text in sample:
        pieces = [tokenizer.encode(piece) for piece in cut_text(text, SAMPLE_PIECE_CHARACTERS)]
        if list(chain.from_iterable(pieces)) != tokenizer.encode(text):
            return False
    return True


def load_encoder(folder: Path, *, fast: bool, cuts_text: bool) -> Encoder:
    """Load the encoder that `choose_encoder` chose for a tokenizer folder, once per process."""
    # The cache key includes the file's inode and mtime: the folder may have been prepared again.
    status = (folder / "tokenizer.json").stat()
    return _load_encoder(folder, (status.st_ino, status.st_mtime_ns), fast, cuts_text)


@lru_cache(maxsize=4)
def _load_encoder(folder: Path, _: tuple[int, int], fast: bool, cuts_text: bool) -> Encoder:
    tokenizer, encoding = load_tokenizer(folder), None
    if fast:
        settings = json.loads(tokenizer.backend.to_str())
        encoding = _build_tiktoken(tokenizer, settings, _byte_ranks(settings))
    return Encoder(tokenizer, encoding, cuts_text)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        if batch and size + len(document.text) > BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
        batch.append(document)
        size += len(document.text)
    if batch:
        yield batch


def _as_tiktoken(tokenizer: Tokenizer) -> tiktoken.Encoding | None:
    """Convert a BPE to `tiktoken`, or return None if it cannot be proven equivalent."""
    settings = json.loads(tokenizer.backend.to_str())
    model, added = settings["model"], settings["added_tokens"]
    plain = (
        model["type"] == "BPE"
        and not any(model.get(k) for k in ("dropout", "byte_fallback"))
        and not any(model.get(k) for k in ("continuing_subword_prefix", "end_of_word_suffix"))
        and settings["normalizer"] is None
        and all(token["special"] for token in added)
        and _word_pattern(settings["pre_tokenizer"]) is not None
    )
    if not plain:
        return None
    ranks = _byte_ranks(settings)
    if ranks is None or not _makes_the_same_merges(model, ranks):
        return None
    return _build_tiktoken(tokenizer, settings, ranks)


def _build_tiktoken(
    tokenizer: Tokenizer, settings: dict, ranks: dict[bytes, int]
) -> tiktoken.Encoding:
    pattern = _word_pattern(settings["pre_tokenizer"])
    # Without any special token tiktoken searches for one at every character, at half the speed. The
    # token is still plain text in a document, since `encode` allows no special tokens.
    special = {tokenizer.end_of_text: tokenizer.end_of_text_id}
    return tiktoken.Encoding("own", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def _word_pattern(pre_tokenizer: dict | None) -> str | None:
    """Return the split pattern of a byte-level pre-tokenizer, None if unknown or another kind."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {"type": None}])
    last = steps[-1]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if len(steps) == 1 and last["use_regex"]:
        return GPT2_WORDS
    split = steps[0]
    own = len(steps) == 2 and split["type"] == "Split" and not last["use_regex"]
    if own and split["behavior"] == "Isolated" and not split["invert"]:
        pattern = split["pattern"].get("Regex")
        return pattern if pattern in KNOWN_WORDS else None
    return None


def _byte_ranks(settings: dict) -> dict[bytes, int] | None:
    """Return the id of each token by its bytes; None if a token is not made of byte characters."""
    names = {token["content"] for token in settings["added_tokens"]}
    spelled = _spelled_bytes()
    try:
        return {
            bytes(spelled[character] for character in token): number
            for token, number in settings["model"]["vocab"].items()
            if token not in names
        }
    except KeyError:
        return None


def _spelled_bytes() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for.

    Printable bytes are represented by themselves, the others by the characters from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {chr(byte): byte for byte in printable}
    return spelled | {chr(256 + i): byte for i, byte in enumerate(others)}


def _makes_the_same_merges(model: dict, ranks: dict[bytes, int]) -> bool:
    """Return whether merging by token rank (tiktoken) equals merging by merge list (tokenizers).

    Both are equal if the list has exactly one merge for each multi-byte token, in order of token
    ids, and each merge is the last one that ranks make when applied to the token's bytes alone. The
    context does not matter: the merges within a token's span are those of its bytes alone.
    """
    spelled = _spelled_bytes()
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
