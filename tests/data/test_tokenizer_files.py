"""Tokenizers as files: what is read has the ids that its own libraries give, or is refused."""

import json

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from pretrain_lib.data.prepare.job import Job
from pretrain_lib.data.prepare.prepare import prepare
from pretrain_lib.data.text.lost_text import UTF8_BYTES, spelled_bytes
from pretrain_lib.data.text.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer

TEXTS = ["the quick brown fox jumps over 12 lazy dogs, isn't it?\n\n"] * 20
TRAINED = train_tokenizer(TEXTS, vocabulary_size=320)
ODD_TEXT = "the café \U0001f600 ZEBRA \x00{x}"


def write(folder, backend):
    path = folder / "tokenizer.json"
    path.write_text(backend if isinstance(backend, str) else backend.to_str())
    return path


def edited(edit):
    content = json.loads(TRAINED.backend.to_str())
    edit(content)
    return json.dumps(content)


def without(*bytes_):
    """Return the trained tokenizer without tokens that hold these bytes."""
    lost = {character for character, byte in spelled_bytes().items() if byte in bytes_}

    def drop(content):
        model = content["model"]
        model["vocab"] = {k: v for k, v in model["vocab"].items() if not lost & {*k}}
        model["merges"] = [pair for pair in model["merges"] if not lost & {*"".join(pair)}]

    return edited(drop)


def trained(model, trainer, pre_tokenizer, **options):
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer
    options |= {"special_tokens": [END_OF_TEXT], "show_progress": False}
    backend.train_from_iterator(TEXTS, trainer(**options))
    return backend


metaspace, byte_level = pre_tokenizers.Metaspace(), pre_tokenizers.ByteLevel()
LOSING = {
    "bytes that the text lacks": trained(models.BPE(), trainers.BpeTrainer, byte_level),
    "one byte": without(0xF0),
    "characters": trained(models.BPE(), trainers.BpeTrainer, metaspace),
    "bytes to fall back on": trained(
        models.BPE(byte_fallback=True), trainers.BpeTrainer, metaspace
    ),
    "the end of a word": trained(
        models.BPE(end_of_word_suffix="</w>"),
        trainers.BpeTrainer,
        byte_level,
        initial_alphabet=byte_level.alphabet(),
        end_of_word_suffix="</w>",
    ),
    "pieces": trained(models.Unigram(), trainers.UnigramTrainer, metaspace),
    "words": trained(models.WordLevel(), trainers.WordLevelTrainer, pre_tokenizers.Whitespace()),
    "word pieces": trained(models.WordPiece(), trainers.WordPieceTrainer, metaspace),
}


@pytest.mark.parametrize("name", LOSING)
def test_a_tokenizer_that_would_lose_text_is_refused(tmp_path, name):
    path = write(tmp_path, LOSING[name])
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": ODD_TEXT, "s": [[0, 3]]}))
    options = {"tokenizer": str(path), "validation": "none"}
    for loss_spans in (None, "s"):
        job = Job((str(tmp_path / "text.jsonl"),), **options, loss_spans=loss_spans)
        with pytest.raises(ValueError, match=r"tokenizer.json would lose text: .* unknown token"):
            prepare(job, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


KEEPING = {
    "bytes that are in no text": without(0xC0, 0xC1, *range(0xF5, 0x100)),
    "pieces of bytes": trained(
        models.Unigram(),
        trainers.UnigramTrainer,
        byte_level,
        initial_alphabet=byte_level.alphabet(),
    ),
}


@pytest.mark.parametrize("name", KEEPING)
def test_a_tokenizer_of_all_bytes_keeps_every_text(tmp_path, name):
    loaded = load_tokenizer(write(tmp_path, KEEPING[name]))
    loaded.backend.decoder = decoders.ByteLevel()
    every = "".join(map(chr, [*range(0x800), *range(0x800, 0xD800, 61), *range(0xE000, 2**16, 61)]))
    every += "".join(map(chr, range(2**16, 0x110000, 997)))
    assert {*every.encode()} == {*UTF8_BYTES}
    assert loaded.decode(loaded.encode(f"a{every}")).removeprefix(" ") == f"a{every}"


def test_an_unknown_token_takes_the_place_of_what_is_not_known(tmp_path):
    lacking = json.loads(without(0xF0))
    lacking["model"]["unk_token"] = END_OF_TEXT
    loaded = load_tokenizer(write(tmp_path, json.dumps(lacking)))
    assert loaded.decode(loaded.encode("a\U0001f600")).startswith(f"a{END_OF_TEXT}")


def add(*tokens):
    backend = tokenizers.Tokenizer.from_str(TRAINED.backend.to_str())
    backend.add_tokens(list(tokens))
    return backend


def mark_words(content):
    """Let tokens end words in a mark that is no byte of the text."""
    vocabulary = content["model"]["vocab"]
    content["model"]["end_of_word_suffix"] = "#"
    for character in spelled_bytes():
        vocabulary.setdefault(f"{character}#", len(vocabulary))


def mark_unknown(content):
    content["model"]["unk_token"] = END_OF_TEXT
    del content["model"]["vocab"][next(k for k, v in spelled_bytes().items() if v == 7)]


@pytest.mark.parametrize(
    "backend",
    [
        add(AddedToken("FOO", lstrip=True)),
        add(AddedToken("FOO", rstrip=True)),
        add(AddedToken("Ġquick")),
        edited(mark_words),
        edited(mark_unknown),
    ],
    ids=["lstrip", "rstrip", "the model's too", "marked words", "a byte"],
)
def test_spans_are_refused_for_tokens_that_are_not_the_bytes_of_the_text(tmp_path, backend):
    options = {"tokenizer": str(write(tmp_path, backend)), "validation": "none"}
    line = {"text": "the \x07 Ġquick  FOO  quick", "s": [[0, 3]]}
    (tmp_path / "text.jsonl").write_text(json.dumps(line))
    job = Job((str(tmp_path / "text.jsonl"),), loss_spans="s", **options)
    with pytest.raises(ValueError, match="data.loss_spans='s' needs a tokenizer whose tokens are"):
        prepare(job, tmp_path / "out", quiet=True)


def test_spans_may_lie_in_added_tokens(tmp_path):
    backend = add(AddedToken("FOO"), AddedToken("né字", single_word=True))
    backend.add_special_tokens([AddedToken("<é>", lstrip=True)])
    options = {"tokenizer": str(write(tmp_path, backend)), "validation": "none"}
    line = {"text": "a  né字 FOO <é> b", "s": [[4, 5], [8, 9]]}
    (tmp_path / "text.jsonl").write_text(json.dumps(line))
    job = Job((str(tmp_path / "text.jsonl"),), loss_spans="s", **options)
    found = prepare(job, tmp_path / "out", quiet=True)["splits"]["train"]
    assert found["counted_tokens"] == 2
