"""Read the spelling of a special token as plain text, whatever the model of the tokenizer knows.

A model whose own vocabulary holds special tokens finds them in a text as it does its other pieces.
SentencePiece never does (Kudo and Richardson 2018): its control symbols are no pieces of text.
"""

import json

import tokenizers
from tokenizers import models

from pretrain_lib.data.text.byte_counts import BYTE

HIDDEN = ""  # no model finds it in a text


def as_plain_text(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Return a tokenizer that encodes alike, but whose model finds no special token in a text.

    It is the given one if that is true of it.
    """
    names = _found_names(backend)
    if not names:
        return backend
    plain = tokenizers.Tokenizer.from_str(backend.to_str())
    plain.model = _without(plain.model, names)
    return plain


def _found_names(backend: tokenizers.Tokenizer) -> set[str]:
    """Return the special tokens that the model may find in a text.

    A byte to fall back on is none of them: without it, the model could not spell the byte.
    """
    model = backend.model
    added = backend.get_added_tokens_decoder().values()
    special = [token.content for token in added if token.special]
    names = {name for name in special if model.token_to_id(name) is not None}
    spelled_bytes = {name for name in names if BYTE.fullmatch(name)}
    if spelled_bytes and json.loads(model.__getstate__()).get("byte_fallback"):
        names -= spelled_bytes
    return {name for name in names if _may_find(model, name)}


def _may_find(model: models.Model, name: str) -> bool:
    if not isinstance(model, models.BPE):
        return True
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        return True  # the same text is spelled otherwise within a word
    try:
        return [token.value for token in model.tokenize(name)] == [name]
    except Exception:  # a bare one: it knows not all of the characters
        return False


def _without(model: models.Model, names: set[str]) -> models.Model:
    """Return a model without pieces of these names, the others having the ids and scores they had.

    The unknown token keeps its place: it stands for what the model does not know.
    """
    settings = {k: v for k, v in json.loads(model.__getstate__()).items() if v is not None}
    del settings["type"]
    vocabulary, unknown = settings["vocab"], settings.get("unk_token")
    if isinstance(model, models.Unigram):  # the position of a piece is its id
        hidden = [(HIDDEN if piece in names else piece, score) for piece, score in vocabulary]
        return models.Unigram(**settings | {"vocab": hidden})
    settings["vocab"] = {k: v for k, v in vocabulary.items() if k not in names}
    if unknown in names:
        settings["vocab"][HIDDEN], settings["unk_token"] = vocabulary[unknown], HIDDEN
    if isinstance(model, models.BPE):
        prefix = settings.get("continuing_subword_prefix", "")
        pairs = [tuple(pair) for pair in settings["merges"]]
        settings["merges"] = [
            (a, b) for a, b in pairs if not names & {a, b, a + b.removeprefix(prefix)}
        ]
    return type(model)(**settings)
