"""Tokenizers as files: what is read has the ids that its own libraries give, or is refused."""

import json

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from pretrain_lib.data.prepare.job import Job
from pretrain_lib.data.prepare.prepare import prepare
from pretrain_lib.data.text.lost_text import UTF8_BYTES
from pretrain_lib.data.text.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer
from pretrain_lib.data.text.tokenizer_parts import spelled_bytes

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


@pytest.mark.parametrize("dropout", [0.5, 1.0])
def test_no_merges_are_left_out_at_random(tmp_path, dropout):
    drop = edited(lambda content: content["model"].update(dropout=dropout))
    loaded = load_tokenizer(write(tmp_path, drop))
    assert loaded.encode(TEXTS[0]) == TRAINED.encode(TEXTS[0])
    assert loaded.sha256 == TRAINED.sha256


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


def write_merges(folder, vocabulary=None, merges=None, **files):
    """Write `vocab.json` and `merges.txt`, by default the trained ones, and JSON files beside."""
    model = json.loads(TRAINED.backend.to_str())["model"]
    lines = ["#version: 0.2", *(merges or map(" ".join, model["merges"]))]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    files["vocab"] = vocabulary or model["vocab"]
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def says(kind, **settings):
    return {"tokenizer_class": kind, "eos_token": END_OF_TEXT, **settings}


LETTERS = [*"abcdefghijklmnopqrstuvwxyz", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz")]
LETTERS += ["th", "the</w>", "<|startoftext|>", END_OF_TEXT]
CLIP = {letter: number for number, letter in enumerate(LETTERS)}
WORD = {"content": "fox jumps", "special": False, **dict.fromkeys(("lstrip", "rstrip"), False)}
WORD |= {"single_word": False, "normalized": True}
NUMBER = TRAINED.vocabulary_size
FOLDERS = {
    "GPT-2": {"tokenizer_config": says("GPT2Tokenizer")},
    "GPT-2 of transformers 4": {"tokenizer_config": says("GPT2TokenizerFast", errors="replace")},
    "GPT-2 without a config": {"config": {"model_type": "gpt2"}},
    "a model with GPT-2's tokenizer": {
        "tokenizer_config": says("GPT2Tokenizer"),
        "config": {"model_type": "gpt_neo"},
    },
    "a prefix": {"tokenizer_config": says("GPT2Tokenizer", add_prefix_space=True)},
    "added tokens": {
        "tokenizer_config": says("GPT2Tokenizer"),
        "added_tokens": {"   ": NUMBER, "fox jumps": NUMBER + 1},
    },
    "added tokens in the config": {
        "tokenizer_config": says("GPT2Tokenizer", added_tokens_decoder={NUMBER: WORD})
    },
    "another end": {
        "tokenizer_config": says("GPT2Tokenizer") | {"eos_token": "<|end|>"},
        "added_tokens": {"<|end|>": NUMBER},
    },
    "Qwen 2": {"tokenizer_config": says("Qwen2Tokenizer")},
    "Qwen 2 without a config": {"config": {"model_type": "qwen2"}},
    "CLIP": {
        "tokenizer_config": says("CLIPTokenizer"),
        "vocabulary": CLIP,
        "merges": ["t h", "th e</w>"],
    },
}
SAMPLES = [" the fox jumps   12345\n\n over", "Fox, it's e\u0301", "", *TEXTS[:1]]


def ids_of_transformers(folder):
    theirs = AutoTokenizer.from_pretrained(folder)
    ids = [theirs(text, add_special_tokens=False)["input_ids"] for text in SAMPLES]
    return ids, theirs.eos_token


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_merges_has_the_ids_that_transformers_gives(tmp_path, name):
    loaded = load_tokenizer(write_merges(tmp_path, **FOLDERS[name]))
    assert ([loaded.encode(text) for text in SAMPLES], loaded.end_of_text) == ids_of_transformers(
        tmp_path
    )
    (tmp_path / "bare").mkdir()
    bare = load_tokenizer(write_merges(tmp_path / "bare"))
    assert (loaded.sha256 == bare.sha256) == ("GPT-2" in name)


@pytest.mark.parametrize("name", ["folder", "file"])
@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": says("GPT2Tokenizer", added_tokens_decoder={NUMBER: WORD})},
        {"tokenizer_config": says("PreTrainedTokenizerFast", added_tokens_decoder={NUMBER: WORD})},
        {"tokenizer_config": says("GPT2Tokenizer", add_prefix_space=True)},
        {"tokenizer_config": says("GPT2Tokenizer"), "added_tokens": {"fox jumps": NUMBER}},
    ],
    ids=["decoder", "any class", "prefix", "added_tokens.json"],
)
def test_what_the_files_beside_a_tokenizer_json_change_is_read(tmp_path, files, name):
    path = write(tmp_path, TRAINED.backend)
    for file, content in files.items():
        (tmp_path / f"{file}.json").write_text(json.dumps(content))
    loaded = load_tokenizer(path if name == "file" else tmp_path)
    expected = ids_of_transformers(tmp_path)
    assert ([loaded.encode(text) for text in SAMPLES], loaded.end_of_text) == expected
    assert loaded.sha256 != TRAINED.sha256


def test_what_changes_no_id_of_a_text_is_left_as_it_is(tmp_path):
    special = WORD | {"content": "<|pad|>", "special": True}
    same = TRAINED.backend.get_added_tokens_decoder()[0].__getstate__()
    config = says("PreTrainedTokenizerFast", added_tokens_decoder={0: same, NUMBER: special})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    write(tmp_path, TRAINED.backend)
    assert load_tokenizer(tmp_path).sha256 == TRAINED.sha256


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": says("NoSuchTokenizer")},
        {"added_tokens": {"fox jumps": NUMBER}},
        {"tokenizer_config": {"auto_map": {"AutoTokenizer": ["a.A", None]}} | says("A")},
    ],
    ids=["class", "no class", "code"],
)
def test_a_folder_that_transformers_does_not_load_either_is_refused(tmp_path, files):
    with pytest.raises(ValueError, match="transformers does not load the folder.*save_pretrained"):
        load_tokenizer(write_merges(tmp_path, **files))


def test_every_form_of_a_tokenizer_takes_its_end_from_the_config_beside_it(tmp_path):
    def rename(content):
        content["added_tokens"][0]["content"] = "<stop>"
        content["model"]["vocab"]["<stop>"] = content["model"]["vocab"].pop(END_OF_TEXT)
        content["model"]["vocab"] |= {END_OF_TEXT: NUMBER}

    path = write(tmp_path, edited(rename))
    other = path.with_name("other.json")
    other.write_bytes(path.read_bytes())
    (tmp_path / "merges").mkdir()
    vocabulary = json.loads(path.read_text())["model"]["vocab"]
    write_merges(tmp_path / "merges", vocabulary=vocabulary)
    for folder in (tmp_path, tmp_path / "merges"):
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<stop>"}))
    for name in (tmp_path, path, other, tmp_path / "merges"):
        assert load_tokenizer(name).end_of_text == "<stop>"


@pytest.mark.parametrize("content", ["[]", "{", '{"eos_token": 5}', '{"eos_token": {}}'])
def test_a_config_that_is_none_is_refused(tmp_path, content):
    path = write(tmp_path, TRAINED.backend)
    (tmp_path / "tokenizer_config.json").write_text(content)
    for name in (path, tmp_path):
        with pytest.raises(ValueError, match="tokenizer_config.json"):
            load_tokenizer(name)
