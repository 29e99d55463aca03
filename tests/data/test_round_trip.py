"""Which tokenizers give back the text: found by kind, shown by decoding."""

import json
import unicodedata

import pytest
import tokenizers
from hypothesis import given, settings

from pretrain_lib.data.text.round_trip import gives_back_text
from pretrain_lib.data.text.tokenizer import END_OF_TEXT, Tokenizer
from tests.data.test_tokenizer import FAMILIES, TRAINED, any_text


def change(tokenizer, **parts):
    """Return a tokenizer with other parts."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    for name, part in parts.items():
        setattr(backend, name, part)
    return Tokenizer(backend, END_OF_TEXT)


def variants():
    """Return tokenizers by name, with whether they give back every text."""
    normalizers, pre = tokenizers.normalizers, tokenizers.pre_tokenizers
    byte_level = pre.ByteLevel
    plain, fallback = FAMILIES["byte_level", False], FAMILIES["byte_fallback", True]
    last = byte_level(add_prefix_space=False, use_regex=False)
    split = pre.Split(tokenizers.Regex(r"\s+|\S+"), "isolated")
    removed = pre.Split(tokenizers.Regex(r"\s+"), "removed")
    digits = [pre.Digits(individual_digits=True), byte_level(add_prefix_space=False)]
    metaspace = pre.Metaspace(prepend_scheme="first", split=False)
    stripping = change(plain)
    stripping.backend.add_tokens([tokenizers.AddedToken("to", lstrip=True)])
    added = change(plain)
    added.backend.add_tokens(["to", "  "])
    with_prefix, without = fallback.backend, FAMILIES["byte_fallback", False].backend
    nfkc = normalizers.Sequence([normalizers.NFKC(), with_prefix.normalizer])
    lacks = json.loads(plain.backend.to_str())
    lacks["model"]["vocab"]["<none>"] = lacks["model"]["vocab"].pop("Ã")
    lacks["model"]["unk_token"] = "<unk>"
    lacks["model"]["merges"] = [m for m in lacks["model"]["merges"] if "Ã" not in "".join(m)]
    names = lacks["model"]["vocab"]
    for name in [name for name in names if "Ã" in name]:
        names[f"<{name.encode().hex()}>"] = names.pop(name)
    own = {str(family): tokenizer for family, tokenizer in FAMILIES.items()}
    keeps = {"('byte_level', False)", "('byte_fallback', True)", "('byte_fallback', False)"}
    found = {name: (tokenizer, name in keeps) for name, tokenizer in own.items()}
    return found | {
        "trained here": (TRAINED, True),
        "split": (change(plain, pre_tokenizer=pre.Sequence([split, last])), True),
        "digits": (change(plain, pre_tokenizer=pre.Sequence(digits)), True),
        "added": (added, True),
        "metaspace": (change(fallback, normalizer=None, pre_tokenizer=metaspace), True),
        "removed": (change(plain, pre_tokenizer=pre.Sequence([removed, last])), False),
        "lower": (change(plain, normalizer=normalizers.Lowercase()), False),
        "strip": (change(plain, normalizer=normalizers.Strip()), False),
        "no decoder": (change(plain, decoder=None), False),
        "prefix kept": (change(fallback, decoder=without.decoder), False),
        "prefix lost": (
            change(FAMILIES["byte_fallback", False], decoder=with_prefix.decoder),
            False,
        ),
        "fallback nfkc": (change(fallback, normalizer=nfkc), False),
        "added that strips": (stripping, False),
        "a byte less": (
            Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(lacks)), END_OF_TEXT),
            False,
        ),
    }


VARIANTS = variants()
TELLING = ["to be  to", " to be", "Größe é", "ﬁ ²", "\t大\n", "TO BE İ", "be."]


@pytest.mark.parametrize("name", VARIANTS)
def test_tokens_give_back_the_text_of_the_kinds_that_are_said_to(name):
    tokenizer, keeps = VARIANTS[name]
    assert gives_back_text(tokenizer.backend) == keeps
    differ = []
    for text in TELLING:
        ids = tokenizer.encode_documents([text])[0]
        differ += [text] * (tokenizer.count_bytes(ids) != len(text.encode()))
    expected = [" to be"] if name == "metaspace" else []  # a space that begins a document
    assert differ == expected if keeps else differ


@settings(deadline=None, max_examples=60)
@given(text=any_text.map(lambda text: text.replace("▁", "").lstrip(" ")))
def test_kinds_that_give_back_the_text_do_so_with_any(text):
    for tokenizer in (tokenizer for tokenizer, keeps in VARIANTS.values() if keeps):
        ids = tokenizer.encode_documents([text])[0]
        assert tokenizer.backend.decode(ids.tolist(), skip_special_tokens=True) == text


def test_a_tokenizer_that_normalizes_to_nfc_counts_the_text_in_that_form():
    tokenizer = change(TRAINED, normalizer=tokenizers.normalizers.NFC())
    assert gives_back_text(tokenizer.backend)
    text = unicodedata.normalize("NFD", "Größe é naïve")
    size = len(unicodedata.normalize("NFC", text).encode())
    assert tokenizer.count_bytes(tokenizer.encode_documents([text])[0]) == size
