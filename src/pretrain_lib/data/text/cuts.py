"""Where a text can be cut without changing a token: behind a word, at the white space after it."""

import re
import string
from collections.abc import Iterator, Sequence
from itertools import chain

from pretrain_lib.data.text.equivalence import word_pattern
from pretrain_lib.data.text.formats import CUT
from pretrain_lib.data.text.tokenizer import Tokenizer
from pretrain_lib.data.text.tokenizer_parts import (
    is_byte_level,
    part_settings,
    part_steps,
    spelled_bytes,
)

CUT_TEXT = re.compile(CUT.pattern.decode())
SAMPLE_PIECE_CHARACTERS = 64
# Tested besides the sample, which may have no place to cut.
CUT_PROBE = "One of the 12 words, in 1999 \n\nor the other\n  of the 30\n" * 40
WORD_CHARACTERS = string.ascii_letters + string.digits
WHITE_SPACE = " \n"


def cut_text(text: str, size: int) -> Iterator[str]:
    """Split a text into pieces of at least `size` characters, at places that change no token."""
    start = 0
    while len(text) - start > size and (cut := CUT_TEXT.search(text, start + size - 1)):
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


def can_cut(tokenizer: Tokenizer, sample: Sequence[str]) -> bool:
    """Return whether the pieces of any text have the ids of the whole.

    That no token spans a cut is seen from their spelling; what else a cut may change, such as a
    prefix at the start of a text, from a sample.
    """
    # Each character before white space: if a model knows neither, one token may stand for both.
    words = [space.join(WORD_CHARACTERS + space) for space in WHITE_SPACE]
    probes = [(text, SAMPLE_PIECE_CHARACTERS) for text in (*sample, CUT_PROBE)]
    if not all(_has_same_ids(tokenizer, *probe) for probe in [*probes, *((w, 1) for w in words)]):
        return False
    spaces = _spelled_spaces(tokenizer)
    return spaces is not None and not _has_token_across(tokenizer, spaces)


def _has_same_ids(tokenizer: Tokenizer, text: str, size: int) -> bool:
    pieces = (tokenizer.encode(piece) for piece in cut_text(text, size))
    return list(chain.from_iterable(pieces)) == tokenizer.encode(text)


def _spelled_spaces(tokenizer: Tokenizer) -> set[str] | None:
    """Return the characters as which white space begins once the text is normalized.

    None if a normalizer may join it to the word before.
    """
    spaces = set(WHITE_SPACE)
    for step in part_steps(tokenizer.backend.normalizer):
        if step["type"] != "Replace":
            continue
        pattern = step["pattern"].get("String")
        if not pattern or {*pattern} & {*WORD_CHARACTERS}:  # a regular expression, or of words
            return None
        if pattern[0] in spaces:
            if not step["content"]:
                return None
            spaces.add(step["content"][0])
    steps = part_steps(tokenizer.backend.pre_tokenizer)
    return spaces | {step["replacement"] for step in steps if step["type"] == "Metaspace"}


def _has_token_across(tokenizer: Tokenizer, spaces: set[str]) -> bool:
    """Return whether a token is spelled with a cut in it, or takes the white space after it."""
    backend = tokenizer.backend
    across = _pairs(spaces)
    for token in backend.get_added_tokens_decoder().values():
        is_moved = token.rstrip or (token.single_word and token.content[0] in spaces)
        if not token.special and (is_moved or across.search(token.content)):
            return True
    if word_pattern(part_settings(backend.pre_tokenizer)) is not None:
        return False  # these words end at every cut
    if is_byte_level(backend):
        spelled = {byte: character for character, byte in spelled_bytes().items()}
        across = _pairs({spelled[space.encode()[0]] for space in spaces})
    vocabulary = backend.get_vocab(with_added_tokens=False)
    return across.search("\0".join(vocabulary)) is not None


def _pairs(spaces: set[str]) -> re.Pattern[str]:
    """Return the pattern of a cut in a token."""
    return re.compile(f"[{WORD_CHARACTERS}][{re.escape(''.join(sorted(spaces)))}]")
