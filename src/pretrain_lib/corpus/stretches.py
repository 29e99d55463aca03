"""Select the windows of the held-out sets that a validation reads, the same in every run."""

from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from pretrain_lib.corpus.paths import HeldOut
from pretrain_lib.data.text.round_trip import gives_back_text
from pretrain_lib.data.text.tokenizer import Tokenizer
from pretrain_lib.data.tokens.arrays import TokenArray
from pretrain_lib.data.windows.packing import validation_windows

HASHED_TOKENS = 2**22  # at a time


@dataclass(frozen=True)
class Stretch:
    """The first windows of a held-out set, each of `sequence_length` targets."""

    name: str
    tokens: TokenArray
    windows: int
    sequence_length: int
    text_bytes: int | None = None
    """UTF-8 size of the predicted text in bytes; None if there is a loss mask, or if it is unknown:
    without a tokenizer, and with one whose tokens do not give back the text."""


def choose_stretches(
    held_out: Sequence[HeldOut],
    sequence_length: int,
    *,
    max_tokens: int | None,
    tokenizer: Tokenizer | None = None,
) -> tuple[Stretch, ...]:
    """Select the windows of each held-out set for a validation over `max_tokens` (None: all).

    `max_tokens` is divided among several sets by weight. `tokenizer`, if given, is used to compute
    `text_bytes`, if its tokens give back the text. Raises ValueError if a set or its share is
    shorter than a window, or if a loss mask leaves out all of it.
    """
    total = sum(text.weight for text in held_out)
    stretches = []
    for text in held_out:
        share = None if max_tokens is None else int(max_tokens * text.weight / total)
        windows = validation_windows(text.tokens, sequence_length, max_tokens=share)
        if not windows:
            share_of = (
                f": the share of {text.name} is {share} tokens," if total > text.weight else " is"
            )
            raise ValueError(
                f"validation.tokens={max_tokens}{share_of} less than batch.sequence_length="
                f"{sequence_length}; raise validation.tokens, or set it to null to read all "
                f"held-out text"
            )
        size = None
        counts = text.tokens.counts(1, windows * sequence_length)
        if counts is not None and not counts.any():
            raise ValueError(
                f"data.validation: the loss mask of {text.name} leaves out each of the "
                f"{windows * sequence_length} tokens that are read; raise validation.tokens, or "
                f"remove the mask (.ds.loss) to count every token"
            )
        if tokenizer is not None and counts is None and gives_back_text(tokenizer.backend):
            ids = text.tokens.read(0, windows * sequence_length + 1)
            size = tokenizer.count_bytes(ids[1:], before=int(ids[0]))
        stretches.append(Stretch(text.name, text.tokens, windows, sequence_length, size))
    return tuple(stretches)


def identify(stretches: Sequence[Stretch], *, document_masking: bool = False) -> str:
    """Return a hash of what a validation measures a loss on: windows, masks, and their length."""
    lengths = " ".join(str(n) for n in sorted({stretch.sequence_length for stretch in stretches}))
    digest = xxhash.xxh3_128(f"{lengths} {document_masking}".encode())
    for stretch in stretches:
        count = stretch.windows * stretch.sequence_length + 1
        digest.update(f" {count} ".encode())
        for start in range(0, count, HASHED_TOKENS):
            size = min(HASHED_TOKENS, count - start)
            digest.update(stretch.tokens.read(start, size).astype("<i8"))
            counted = stretch.tokens.counts(start, size)
            digest.update(b"" if counted is None else counted)
    return digest.hexdigest()
