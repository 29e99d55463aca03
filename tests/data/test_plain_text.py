"""No text forges a special token, whatever the model of the tokenizer knows."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers, trainers

from pretrain_lib.data.text.encoder import choose_encoder
from pretrain_lib.data.text.tokenizer import load_tokenizer

SPECIAL = ["<unk>", "</s>", "[SEP]"]
TEXTS = ["the </s> fox [SEP] jumps </s>over [ S E P ] < / s > <unk> u n k", "##</s> isn't it? x"]
KINDS = {
    "unigram": (models.Unigram(), trainers.UnigramTrainer, pre_tokenizers.Metaspace()),
    "words": (
        models.WordLevel(unk_token="<unk>"),
        trainers.WordLevelTrainer,
        pre_tokenizers.WhitespaceSplit(),
    ),
    "word pieces": (
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer,
        pre_tokenizers.WhitespaceSplit(),
    ),
    "merges": (models.BPE(unk_token="<unk>"), trainers.BpeTrainer, pre_tokenizers.Metaspace()),
    "whole words": (
        models.BPE(unk_token="<unk>", ignore_merges=True),
        trainers.BpeTrainer,
        pre_tokenizers.WhitespaceSplit(),
    ),
    "marked words": (
        models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"),
        trainers.BpeTrainer,
        pre_tokenizers.WhitespaceSplit(),
    ),
}
HARD = st.lists(st.sampled_from([*SPECIAL, " ", "the", "s>", "<", "/", "é", "##", "[SEP"]))


def train(kind):
    model, trainer, pre_tokenizer = KINDS[kind]
    backend = tokenizers.Tokenizer(type(model)(**arguments(model)))
    backend.pre_tokenizer = pre_tokenizer
    options = {"special_tokens": SPECIAL, "show_progress": False, "vocab_size": 200}
    options |= {"unk_token": "<unk>"} if kind == "unigram" else {}
    options |= {"end_of_word_suffix": "</w>"} if kind == "marked words" else {}
    backend.train_from_iterator(TEXTS * 20, trainer(**options))
    return backend


def arguments(model):
    fields = ("unk_token", "ignore_merges", "end_of_word_suffix")
    found = {field: getattr(model, field, None) for field in fields}
    return {field: value for field, value in found.items() if value}


def renamed(backend):
    """Return a tokenizer with other names of special tokens, which no text here spells."""
    settings = json.loads(backend.to_str())
    settings["added_tokens"], model = [], settings["model"]
    names = {name: chr(0xE000 + i) for i, name in enumerate(SPECIAL)}
    if isinstance(model["vocab"], list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {names.get(name, name): i for name, i in model["vocab"].items()}
        model["unk_token"] = names["<unk>"]
    if "merges" in model:
        pairs = [(a, b) for a, b in model["merges"] if not {a, b, a + b} & {*SPECIAL}]
        model["merges"] = pairs
    return tokenizers.Tokenizer.from_str(json.dumps(settings))


def load(folder, backend, end="</s>"):
    (folder / "tokenizer.json").write_text(backend.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    return load_tokenizer(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_the_spelling_of_a_special_token_is_plain_text(tmp_path, kind):
    backend = train(kind)
    backend.add_tokens(["FOO"])
    loaded, reference = load(tmp_path, backend), renamed(backend)
    encoder = choose_encoder(loaded, TEXTS)
    forged = {loaded.backend.token_to_id(name) for name in SPECIAL[1:]}

    @settings(deadline=None, max_examples=60)
    @given(HARD.map("".join))
    def ids_are_those_of_other_names(text):
        expected = reference.encode(text).ids
        assert loaded.encode(text) == expected
        assert encoder.encode([text.encode()])[0][1:].tolist() == expected
        assert not forged & {*expected}

    ids_are_those_of_other_names()
    assert loaded.encode("FOO")[-1] == backend.token_to_id("FOO")
    saved = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert loaded.backend.to_str() == saved.to_str()  # what is saved and hashed


def test_a_special_token_that_no_text_can_give_costs_nothing(tmp_path):
    backend = train("merges")
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    options = {"special_tokens": SPECIAL, "show_progress": False}
    backend.train_from_iterator(["the fox"] * 20, trainers.BpeTrainer(**options))
    loaded = load(tmp_path, backend)
    assert loaded.plain is loaded.backend


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_an_end_of_text_that_is_a_byte_of_the_text_is_refused(tmp_path, kind):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=kind == "byte fallback"))
    backend.pre_tokenizer = byte_level if kind == "byte level" else None
    alphabet = byte_level.alphabet() if kind == "byte level" else []
    fallback = [f"<0x{byte:02X}>" for byte in range(256) if byte != 10] if not alphabet else []
    end = "Ċ" if alphabet else "\n"
    options = {"initial_alphabet": alphabet, "special_tokens": [*fallback, end]}
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(**options, show_progress=False))
    with pytest.raises(ValueError, match="would lose text: .* ordinary token for 1 of the bytes"):
        load(tmp_path, backend, end)


def test_bytes_to_fall_back_on_stay_where_they_are_special(tmp_path):
    fallback = [AddedToken(f"<0x{byte:02X}>", special=True) for byte in range(256)]
    pieces = [(str(token), 0.0) for token in ["<unk>", "</s>", *(t.content for t in fallback)]]
    backend = tokenizers.Tokenizer(models.Unigram([*pieces, ("a", -1.0)], 0, byte_fallback=True))
    backend.add_special_tokens([*SPECIAL[:2], *fallback])
    loaded = load(tmp_path, backend)
    assert loaded.encode("aé") == [258, 2 + 0xC3, 2 + 0xA9]
    assert loaded.encode("</s>") == [2 + byte for byte in b"</s>"]
