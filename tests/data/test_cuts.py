"""Long texts are cut only where that changes no token, whatever the sample holds."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from pretrain_lib.data.text import encoder as encoder_module
from pretrain_lib.data.text.cuts import CUT_PROBE
from pretrain_lib.data.text.encoder import choose_encoder
from pretrain_lib.data.text.equivalence import GPT4_WORDS
from pretrain_lib.data.text.tokenizer import END_OF_TEXT, Tokenizer, train_tokenizer

WORDS = ["Blue", "Whale", "New York", "x", "a", "foo", "9", "``q", "\n\nZZ  end", "é"]
TEXT = " ".join([*WORDS, "Blue Whale", "a b c d", "Q\nQ", "x foo  ", "Blue\nWhale"] * 20)
TRAINED = train_tokenizer(["the quick brown fox, 12 lazy dogs"] * 9, vocabulary_size=300)


def byte_level(*, added=(), normalizer=None, special=False, words=None):
    backend = tokenizers.Tokenizer.from_str(TRAINED.backend.to_str())
    (backend.add_special_tokens if special else backend.add_tokens)(list(added))
    backend.normalizer = normalizer
    if words is not None:
        split = pre_tokenizers.Split(Regex(words), "isolated")
        steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return Tokenizer(backend, END_OF_TEXT)


def across_bytes():
    """Return a BPE of bytes whose words, and one of whose merges, go on behind a space."""
    content = json.loads(TRAINED.backend.to_str())
    content["pre_tokenizer"]["use_regex"] = False
    size = len(content["model"]["vocab"])
    content["model"]["vocab"]["eĠW"] = size
    content["model"]["vocab"]["ĠW"] = size + 1
    content["model"]["merges"] += [["Ġ", "W"], ["e", "ĠW"]]
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)), END_OF_TEXT)


def pieces(*across, space="▁", normalizer=None, unknown=""):
    """Return a Unigram of characters with pieces of several words."""
    known = {*TEXT, *CUT_PROBE, space} - {" ", *unknown}
    vocabulary = [("<unk>", 0.0), (END_OF_TEXT, -9.0), *((c, -6.0) for c in sorted(known))]
    vocabulary += [(piece, -3.0) for piece in across]
    backend = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=0))
    backend.normalizer = normalizer
    if normalizer is None:
        options = {"replacement": space, "prepend_scheme": "never", "split": False}
        backend.pre_tokenizer = pre_tokenizers.Metaspace(**options)
    backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend, END_OF_TEXT)


Replace = normalizers.Replace
ACROSS = {
    "an added token": byte_level(added=[AddedToken("Blue Whale")]),
    "an added token with a newline": byte_level(added=[AddedToken("Q\nQ")]),
    "an added token of the normalized text": byte_level(
        added=[AddedToken("Blue_Whale")], normalizer=Replace(" ", "_")
    ),
    "white space behind": byte_level(added=[AddedToken("foo", rstrip=True)]),
    "a word alone": byte_level(added=[AddedToken(" foo", single_word=True)]),
    "a merge of bytes": across_bytes(),
    "a piece": pieces("Blue▁Whale"),
    "a piece with a newline": pieces("Blue\nWhale"),
    "a piece with another space": pieces("Blue_Whale", space="_"),
    "a piece by a normalizer": pieces("Blue_Whale", space="_", normalizer=Replace(" ", "_")),
    "no spaces": pieces("ab", normalizer=Replace(" ", "")),
    "unknown characters": pieces(unknown="Q\n"),
    "a regular expression": byte_level(normalizer=Replace(Regex("([a-z]) (?=[a-z] )"), "Q")),
    "a phrase": byte_level(normalizer=Replace("New York", "NY")),
}


def is_as_whole(tokenizer, *, cuts):
    """Return whether the ids are those of the whole text, when it is or may be cut anywhere."""
    encoder = choose_encoder(tokenizer, ["zzz"])
    assert encoder.cuts_text == cuts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder_module, "PIECE_CHARACTERS", 1)
        ids = encoder.encode([TEXT.encode()])[0]
    return np.array_equal(ids, tokenizer.encode_documents([TEXT])[0])


@pytest.mark.parametrize("name", ACROSS)
def test_text_is_not_cut_where_a_token_may_span_the_cut(name):
    assert is_as_whole(ACROSS[name], cuts=False)


WITHIN = {
    "words of GPT-2": TRAINED,
    "words of GPT-4": byte_level(words=GPT4_WORDS),
    "other words": byte_level(words=r"\s?[a-z]+|\s?[^\sa-z]+|\s+"),
    "added tokens": byte_level(added=[AddedToken("foo", lstrip=True), AddedToken(" Whale")]),
    "an added word alone": byte_level(added=[AddedToken("foo", single_word=True)]),
    "special tokens": byte_level(added=[AddedToken("Blue Whale", rstrip=True)], special=True),
    "a normalizer": byte_level(normalizer=normalizers.NFKC()),
    "quotes": byte_level(normalizer=normalizers.Sequence([Replace("``", '"'), Replace("`", "")])),
    "pieces": pieces("▁Whale", "Blue", "``q"),
    "pieces by a normalizer": pieces("▁Whale", "Blue", normalizer=Replace(" ", "▁")),
}


@pytest.mark.parametrize("name", WITHIN)
def test_text_is_cut_where_none_does(name):
    assert is_as_whole(WITHIN[name], cuts=True)
