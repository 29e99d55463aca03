"""Which stretches of the held-out texts a validation reads: the same whatever runs."""

from collections.abc import Sequence
from dataclasses import dataclass

from pretrain_lib.corpus.paths import HeldOut
from pretrain_lib.data.text.tokenizer import Tokenizer
from pretrain_lib.data.tokens.arrays import TokenArray
from pretrain_lib.data.windows.packing import validation_windows


@dataclass(frozen=True)
class Stretch:
    """The beginning of a held-out text, in whole windows."""

    name: str
    tokens: TokenArray
    windows: int
    text_bytes: int | None = None
    """Of the text that is predicted, as UTF-8; None where it is not known."""


def choose_stretches(
    held_out: Sequence[HeldOut],
    sequence_length: int,
    *,
    max_tokens: int | None,
    tokenizer: Tokenizer | None = None,
) -> tuple[Stretch, ...]:
    """Return the windows of each text that a validation over `max_tokens` (None: all) reads.

    Of several texts each gives its share by weight. Sizes in bytes are counted if there is a
    `tokenizer`. Raises ValueError if a text or its share has no window.
    """
    total = sum(text.weight for text in held_out)
    found = []
    for text in held_out:
        share = None if max_tokens is None else int(max_tokens * text.weight / total)
        if len(held_out) > 1 and share is not None and share < sequence_length:
            raise ValueError(
                f"validation.tokens={max_tokens}: the share of {text.name} is {share} tokens, "
                f"less than batch.sequence_length={sequence_length}; raise it, or give null for "
                f"all that is held out"
            )
        windows = validation_windows(text.tokens, sequence_length, max_tokens=share)
        size = None
        if tokenizer is not None:
            size = tokenizer.count_bytes(text.tokens.read(1, windows * sequence_length))
        found.append(Stretch(text.name, text.tokens, windows, size))
    return tuple(found)
