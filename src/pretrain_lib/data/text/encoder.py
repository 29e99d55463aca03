"""Tokenize documents with the fastest library that gives the same ids as the tokenizer.

`gigatoken` is ten to thirty times as fast as `tiktoken`, which is two to four times as fast as
`tokenizers`. `gigatoken` is used for kinds of tokenizers that it encodes alike (`equivalence`) if
its ids equal those of `tokenizers` on a sample and on a fixed set of hard texts; `tiktoken` if it
is proven equivalent besides; `tokenizers` otherwise.
"""

import ctypes
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import psutil
import tiktoken

from pretrain_lib.data.text.cuts import can_cut, cut_text
from pretrain_lib.data.text.equivalence import (
    HARD_TEXTS,
    as_tiktoken,
    build_tiktoken,
    has_gigatoken_shape,
    has_new_characters,
    strip_added_tokens,
)
from pretrain_lib.data.text.tokenizer import Tokenizer, load_tokenizer
from pretrain_lib.data.tokens.shards import token_dtype

PIECE_CHARACTERS = 2**15  # longer documents are tokenized in pieces of this size
BATCH_BYTES = 2**20  # size of a batch of documents for `tokenizers`
CACHE_BYTES = 256 * 2**20  # by how much a process may grow before `gigatoken` drops its caches


class CachingEncoder:
    """A `gigatoken` encoder that is made anew when its caches have grown too large.

    It caches every word that it meets and never forgets one: text without repetition fills memory.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises RuntimeError if `gigatoken` does not know the kind of tokenizer."""
        self.json, self.process = strip_added_tokens(tokenizer), psutil.Process()
        self._renew()

    def _renew(self) -> None:
        import gigatoken  # not needed to train on prepared tokens

        self.backend = None
        # What was freed but kept would hide how much the next caches grow.
        if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:  # of glibc
            trim(0)
        # Of the backend, `encode` returns NumPy arrays; for batches, awkward would be imported.
        self.backend = gigatoken.Tokenizer.from_json(self.json).backend
        self.start = self.process.memory_info().rss

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Return the ids of each text, uint32."""
        if self.process.memory_info().rss - self.start > CACHE_BYTES:
            self._renew()
        return [self.backend.encode(text) for text in texts]


@dataclass(frozen=True)
class Encoder:
    """Tokenizes documents into ids of the on-disk dtype."""

    tokenizer: Tokenizer
    fast: CachingEncoder | tiktoken.Encoding | None
    """The equivalent encoder of a faster library, or None to use `tokenizers`."""
    cuts_text: bool
    """Whether tokenizing a text in pieces, split at matches of `CUT`, gives the same ids."""

    @property
    def package(self) -> str:
        """The library that encodes: `gigatoken`, `tiktoken` or `tokenizers`."""
        if self.fast is None:
            return "tokenizers"
        return "gigatoken" if isinstance(self.fast, CachingEncoder) else "tiktoken"

    @cached_property
    def dtype(self) -> np.dtype:
        """The dtype of ids on disk."""
        return token_dtype(self.tokenizer.vocabulary_size)

    def encode(
        self, texts: Sequence[bytes], *, begins: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of UTF-8 texts, one after the other, and where each one ends, int64.

        `begins` says whether each text begins a document, and so gets an end-of-text id.
        """
        begin = np.array([self.tokenizer.end_of_text_id] * begins, dtype=self.dtype)
        rows = list(self._encode_each(texts))
        parts = [part for row in rows for part in (begin, row)] or [begin[:0]]
        ids = np.concatenate(parts, dtype=self.dtype, casting="unsafe")
        return ids, np.cumsum([len(begin) + len(row) for row in rows], dtype=np.int64)

    def _encode_each(self, texts: Sequence[bytes]) -> Iterator[np.ndarray]:
        """Yield the ids of each text."""
        if self.package == "gigatoken":
            for text, ids in zip(texts, self.fast.encode(texts), strict=True):
                yield self._encode_mixed(text.decode()) if has_new_characters(text) else ids
        elif self.package == "tiktoken":
            for text in texts:
                pieces = [self._encode_piece(piece) for piece in self._pieces(text.decode())]
                yield np.concatenate(pieces)
        else:
            for batch in _batches(texts):
                if len(batch) == 1:
                    yield self._encode_slowly(batch[0])
                else:
                    for ids in self.tokenizer.encode_documents(batch):
                        yield ids[1:].astype(self.dtype)

    def _encode_piece(self, text: str) -> np.ndarray:
        try:
            return self.fast.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # its regex engine overflows on a long run of white space
            return self.tokenizer.encode_documents([text])[0][1:]

    def _encode_mixed(self, text: str) -> np.ndarray:
        """Leave the pieces that `gigatoken` and `tokenizers` see otherwise to `tokenizers`."""
        parts = []
        for piece in self._pieces(text):
            raw = piece.encode()
            is_new = has_new_characters(raw)
            parts.append(self._encode_slowly(piece) if is_new else self.fast.encode([raw])[0])
        return np.concatenate(parts)

    def _encode_slowly(self, text: str) -> np.ndarray:
        ids = (self.tokenizer.encode_documents([piece])[0][1:] for piece in self._pieces(text))
        return np.concatenate([piece.astype(self.dtype) for piece in ids])

    def _pieces(self, text: str) -> Iterator[str]:
        return cut_text(text, PIECE_CHARACTERS if self.cuts_text else len(text))


def choose_encoder(tokenizer: Tokenizer, sample: Sequence[str]) -> Encoder:
    """Return the fastest encoder that gives the ids of `tokenizer`, checked on `sample`."""
    cuts_text = can_cut(tokenizer, sample)
    if has_gigatoken_shape(tokenizer):
        encoder = Encoder(tokenizer, _as_gigatoken(tokenizer), cuts_text)
        spelled = [token.content for token in tokenizer.backend.get_added_tokens_decoder().values()]
        if encoder.fast and _is_exact(encoder, [*sample, *HARD_TEXTS, *spelled, "".join(spelled)]):
            return encoder
    encoder = Encoder(tokenizer, as_tiktoken(tokenizer), cuts_text)
    return encoder if _is_exact(encoder, sample) else Encoder(tokenizer, None, cuts_text)


def _as_gigatoken(tokenizer: Tokenizer) -> CachingEncoder | None:
    try:
        return CachingEncoder(tokenizer)
    except RuntimeError:  # it knows no pre-tokenizer of this pattern, or the like
        return None


def _is_exact(encoder: Encoder, texts: Sequence[str]) -> bool:
    ids, ends = encoder.encode([text.encode() for text in texts])
    expected = encoder.tokenizer.encode_documents(texts)
    return np.array_equal(
        ends, np.cumsum([len(document) for document in expected], dtype=np.int64)
    ) and (not texts or np.array_equal(ids, np.concatenate(expected)))


def load_encoder(folder: Path, *, package: str, cuts_text: bool) -> Encoder:
    """Load the encoder that `choose_encoder` chose for a tokenizer folder, once per process."""
    # The cache key includes the file's inode and mtime: the folder may have been prepared again.
    status = (folder / "tokenizer.json").stat()
    return _load_encoder(folder, (status.st_ino, status.st_mtime_ns), package, cuts_text)


@lru_cache(maxsize=4)
def _load_encoder(folder: Path, _: tuple[int, int], package: str, cuts_text: bool) -> Encoder:
    tokenizer, fast = load_tokenizer(folder), None
    if package == "gigatoken":
        fast = CachingEncoder(tokenizer)
    elif package == "tiktoken":
        fast = build_tiktoken(tokenizer, json.loads(tokenizer.backend.to_str()))
    return Encoder(tokenizer, fast, cuts_text)


def _batches(texts: Sequence[bytes]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and size + len(text) > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(text.decode())
        size += len(text)
    if batch:
        yield batch
