"""The tokenizer: loaded from a folder, a `tokenizer.json` or the Hub, or trained on the source."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers

from pretrain_lib.data.text.byte_counts import count_bytes
from pretrain_lib.data.text.lost_text import check_keeps_text
from pretrain_lib.data.text.plain_text import as_plain_text
from pretrain_lib.data.text.tokenizer_files import END_OF_TEXT, byte_level, read_backend
from pretrain_lib.values import check_value, show

SMALLEST_VOCABULARY = 257  # 256 bytes and the end-of-text token
KNOWN_ENDS_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")


@dataclass(frozen=True)
class Tokenizer:
    """A `tokenizers.Tokenizer` with the token that begins every document."""

    backend: tokenizers.Tokenizer
    end_of_text: str

    @property
    def vocabulary_size(self) -> int:
        """The largest id plus one."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def end_of_text_id(self) -> int:
        """The id of the token that begins every document."""
        return self.backend.token_to_id(self.end_of_text)

    @cached_property
    def plain(self) -> tokenizers.Tokenizer:
        """What encodes: in no text does its model find a special token."""
        return as_plain_text(self.backend)

    @property
    def sha256(self) -> str:
        """A hash of everything that determines the ids of a text."""
        return hashlib.sha256((self.backend.to_str() + self.end_of_text).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Tokenize a text, adding no tokens; special tokens spelled in it are treated as text."""
        return self.encode_documents([text])[0][1:].tolist()

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return one int64 array per document: the end-of-text id, then the ids of the text."""
        # The spelling of a special token in a text is plain text.
        self.plain.encode_special_tokens = True
        encodings = self.plain.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array([self.end_of_text_id, *e.ids], dtype=np.int64) for e in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, including special tokens."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def count_bytes(self, ids: np.ndarray, *, before: int | None = None) -> int:
        """Return the UTF-8 size in bytes of the text of `ids`, without special tokens.

        `before` is the id of the token before `ids`; None if they begin a document.
        """
        before = self.end_of_text_id if before is None else before
        return count_bytes(self.backend, ids, before=before, end_of_text_id=self.end_of_text_id)

    def save(self, folder: Path | str, *, context_length: int | None = None) -> None:
        """Save a folder that transformers 4 and 5 load as a tokenizer with the same ids."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # `encode_special_tokens` is not serialized: a reloaded tokenizer parses special tokens.
        (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.end_of_text,
            "eos_token": self.end_of_text,
            "unk_token": self.end_of_text,
            "clean_up_tokenization_spaces": False,
        }
        if context_length is not None:
            settings["model_max_length"] = context_length
        text = json.dumps(settings, indent=2) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def load_tokenizer(name: str | Path) -> Tokenizer:
    """Load a tokenizer from a folder, a `tokenizer.json` file, or the Hub (`OWNER/NAME`, `gpt2`).

    A folder holds `tokenizer.json`, or the `vocab.json` and `merges.txt` of a byte-level BPE.
    Raises ValueError for one that would lose text.
    """
    backend, declared = read_backend(name)
    tokenizer = _with_end_of_text(backend, declared, name)
    check_keeps_text(tokenizer.plain, name)
    return tokenizer


def train_tokenizer(texts: Iterable[str], *, vocabulary_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer with at most `vocabulary_size` ids on `texts`."""
    if isinstance(texts, str):
        raise ValueError(f"texts={show(texts)} must be several texts, such as [text]")
    vocabulary_size = check_value(vocabulary_size, "vocabulary_size", int)
    check_vocabulary_size(vocabulary_size)
    backend = byte_level(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, END_OF_TEXT)


def check_vocabulary_size(vocabulary_size: int) -> None:
    """Raise ValueError if `vocabulary_size` is too small for a byte-level BPE."""
    if vocabulary_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"train_tokenizer={vocabulary_size} must be at least {SMALLEST_VOCABULARY}: "
            f"256 bytes and {END_OF_TEXT}"
        )


def _with_end_of_text(
    backend: tokenizers.Tokenizer, declared: str | None, name: str | Path
) -> Tokenizer:
    # A tokenizer.json may set truncation and padding for inference; both would alter documents. So
    # would dropout, which leaves out merges at random.
    backend.no_truncation()
    backend.no_padding()
    if getattr(backend.model, "dropout", None):
        backend.model.dropout = None
    if backend.num_special_tokens_to_add(False):
        # A post-processor adds special tokens to every text, even to a piece of a document.
        backend.post_processor = None
    for token in (declared,) if declared else KNOWN_ENDS_OF_TEXT:
        if backend.token_to_id(token) is not None:
            # Make it special: otherwise a text that spells it would forge a document boundary.
            backend.add_special_tokens([tokenizers.AddedToken(token, special=True)])
            return Tokenizer(backend, token)
    raise ValueError(
        f"data.tokenizer={name} has no end-of-text token ({declared or KNOWN_ENDS_OF_TEXT}); "
        f"name one of its tokens as eos_token in a tokenizer_config.json beside it"
    )
