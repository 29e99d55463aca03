"""The tokenizer: deterministic training, exact round trips, documents that no text can forge."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain_lib.data.text.tokenizer import (
    END_OF_TEXT,
    Tokenizer,
    load_tokenizer,
    train_tokenizer,
)

CORPUS = [
    Path(json.__file__).read_text(),
    "Größe, 大きさ, размер\n" * 20,
    "to be or not to be " * 50,
]
TRAINED = train_tokenizer(CORPUS, vocabulary_size=400)
unicode_text = st.text(st.characters(exclude_categories=["Cs"]))
code_text = st.lists(st.sampled_from(CORPUS[0].split(" ")), max_size=30).map(" ".join)
forged_text = st.lists(st.sampled_from([END_OF_TEXT, "<|endof", "text|>", " ", "a"])).map("".join)
any_text = st.one_of(unicode_text, code_text, forged_text)


def edit_tokenizer(path, edit):
    content = json.loads(TRAINED.backend.to_str())
    edit(content)
    path.write_text(json.dumps(content))
    return path


def test_training_is_deterministic():
    again = train_tokenizer(iter(CORPUS), vocabulary_size=400)
    assert again.backend.to_str() == train_tokenizer(CORPUS, vocabulary_size=400).backend.to_str()
    assert again.vocabulary_size == TRAINED.vocabulary_size == 400


@given(any_text)
def test_decoding_gives_back_the_text(text):
    ids = TRAINED.encode(text)
    assert TRAINED.decode(ids) == text
    assert TRAINED.end_of_text_id not in ids


@given(st.lists(any_text, max_size=5))
def test_every_document_begins_with_the_end_of_text_id_and_holds_it_once(texts):
    documents = TRAINED.encode_documents(texts)
    assert len(documents) == len(texts)
    for text, document in zip(texts, documents, strict=True):
        assert document.dtype == np.int64
        assert np.flatnonzero(document == TRAINED.end_of_text_id).tolist() == [0]
        assert document[1:].tolist() == TRAINED.encode(text)


def test_text_that_spells_the_special_token_stays_text_after_loading(tmp_path):
    TRAINED.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    text = f"a{END_OF_TEXT}b"
    assert loaded.end_of_text_id == loaded.backend.token_to_id(END_OF_TEXT) == 0
    assert loaded.decode(loaded.encode(text)) == text
    assert 0 not in loaded.encode(text)


def test_text_cannot_forge_an_end_of_text_token_that_is_not_marked_special(tmp_path):
    def unmark(content):
        content["added_tokens"][0]["special"] = False

    loaded = load_tokenizer(edit_tokenizer(tmp_path / "tokenizer.json", unmark))
    assert loaded.end_of_text_id not in loaded.encode(f"a{END_OF_TEXT}b")


def test_truncation_and_padding_in_a_tokenizer_json_do_not_touch_documents(tmp_path):
    def limit(content):
        content["truncation"] = {
            "direction": "Right",
            "max_length": 4,
            "strategy": "LongestFirst",
            "stride": 0,
        }
        content["padding"] = {
            "strategy": {"Fixed": 64},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": END_OF_TEXT,
        }

    loaded = load_tokenizer(edit_tokenizer(tmp_path / "tokenizer.json", limit))
    texts = ["a much longer text than four tokens", "x"]
    documents = [document.tolist() for document in loaded.encode_documents(texts)]
    assert documents == [document.tolist() for document in TRAINED.encode_documents(texts)]


def test_saved_folder_loads_in_transformers_with_equal_ids(tmp_path):
    from transformers import AutoTokenizer

    TRAINED.save(tmp_path, context_length=128)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == TRAINED.end_of_text_id
    assert theirs.model_max_length == 128
    assert len(theirs) == TRAINED.vocabulary_size

    @settings(max_examples=50, deadline=None)
    @given(st.one_of(unicode_text, code_text))
    def ids_are_equal(text):
        assert theirs(text, add_special_tokens=False)["input_ids"] == TRAINED.encode(text)
        assert theirs.decode(TRAINED.encode(text)) == text

    ids_are_equal()


def test_all_local_forms_of_a_tokenizer_give_equal_ids(tmp_path):
    TRAINED.save(tmp_path / "folder")
    (tmp_path / "bare").mkdir()
    bare = tmp_path / "bare" / "tokenizer.json"
    bare.write_text(TRAINED.backend.to_str())
    (tmp_path / "gpt2").mkdir()
    TRAINED.backend.model.save(str(tmp_path / "gpt2"))
    assert sorted(p.name for p in (tmp_path / "gpt2").iterdir()) == ["merges.txt", "vocab.json"]
    texts = [*CORPUS, f"a{END_OF_TEXT}b", ""]
    expected = [document.tolist() for document in TRAINED.encode_documents(texts)]
    for name in (tmp_path / "folder", bare, tmp_path / "bare", str(tmp_path / "gpt2")):
        loaded = load_tokenizer(name)
        assert [document.tolist() for document in loaded.encode_documents(texts)] == expected
        assert loaded.end_of_text == END_OF_TEXT
        assert loaded.vocabulary_size == TRAINED.vocabulary_size


def test_sha256_survives_saving_and_differs_when_the_vocabulary_does(tmp_path):
    TRAINED.save(tmp_path)
    assert load_tokenizer(tmp_path).sha256 == TRAINED.sha256
    TRAINED.encode(END_OF_TEXT)
    assert load_tokenizer(tmp_path).sha256 == TRAINED.sha256
    assert train_tokenizer(CORPUS, vocabulary_size=401).sha256 != TRAINED.sha256
    assert train_tokenizer(["other"], vocabulary_size=400).sha256 != TRAINED.sha256


def test_declared_end_of_text_is_the_one_used(tmp_path):
    def rename(content):
        content["added_tokens"][0]["content"] = "<stop>"
        content["model"]["vocab"]["<stop>"] = content["model"]["vocab"].pop(END_OF_TEXT)

    path = edit_tokenizer(tmp_path / "tokenizer.json", rename)
    with pytest.raises(ValueError, match="no end-of-text token.*eos_token"):
        load_tokenizer(path)
    for declared in ("<stop>", {"content": "<stop>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": declared}))
        assert load_tokenizer(tmp_path).end_of_text == "<stop>"


@pytest.mark.parametrize("size", [0, 256])
def test_vocabulary_smaller_than_the_bytes_is_refused(size):
    with pytest.raises(ValueError, match=f"train_tokenizer={size} must be at least 257"):
        train_tokenizer(["text"], vocabulary_size=size)


def test_one_text_is_not_several():
    with pytest.raises(ValueError, match=r"texts=abc def must be several texts, such as \[text\]"):
        train_tokenizer("abc def", vocabulary_size=300)


def test_paths_are_taken_as_text_and_sizes_from_numpy(tmp_path):
    tokenizer = train_tokenizer(["abc def"], vocabulary_size=np.int64(260))
    tokenizer.save(str(tmp_path / "a"))
    assert load_tokenizer(tmp_path / "a").sha256 == tokenizer.sha256


def test_smallest_vocabulary_holds_the_bytes_and_the_end_of_text():
    smallest = train_tokenizer(["text"], vocabulary_size=257)
    assert smallest.vocabulary_size == 257
    assert len(smallest.encode("Größe")) == len("Größe".encode())


def test_folder_without_tokenizer_files_is_refused(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ValueError, match="needs tokenizer.json, or vocab.json and merges.txt"):
        load_tokenizer(tmp_path)


def test_file_that_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(ValueError, match="is not a tokenizer.json"):
            load_tokenizer(name)


def test_a_byte_order_mark_in_tokenizer_config_is_no_part_of_it(tmp_path):
    TRAINED.save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_tokenizer(tmp_path).sha256 == TRAINED.sha256


def trained(kind, *, prefix=True):
    """Train a small tokenizer of a family."""
    scheme = "always" if prefix else "never"
    options = {"vocab_size": 400, "special_tokens": [END_OF_TEXT, "<unk>"], "show_progress": False}
    normalizers, pre, decoders = (
        tokenizers.normalizers,
        tokenizers.pre_tokenizers,
        tokenizers.decoders,
    )
    spelled_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    if kind == "wordpiece":
        backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="<unk>"))
        backend.pre_tokenizer = pre.BertPreTokenizer()
        backend.decoder = decoders.WordPiece(cleanup=prefix)
        trainer = tokenizers.trainers.WordPieceTrainer(**options)
    elif kind == "unigram":
        backend = tokenizers.Tokenizer(tokenizers.models.Unigram())
        backend.pre_tokenizer = pre.Metaspace(prepend_scheme=scheme)
        backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
        trainer = tokenizers.trainers.UnigramTrainer(unk_token="<unk>", **options)
    elif kind == "words":
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="<unk>"))
        backend.pre_tokenizer = pre.Whitespace()
        trainer = tokenizers.trainers.WordLevelTrainer(**options)
    elif kind == "byte_level":
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = pre.ByteLevel(add_prefix_space=prefix)
        backend.decoder = decoders.ByteLevel()
        options["initial_alphabet"] = pre.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(**options)
    elif kind == "end_of_word":
        backend = tokenizers.Tokenizer(
            tokenizers.models.BPE(unk_token="<unk>", end_of_word_suffix="</w>")
        )
        backend.pre_tokenizer = pre.Whitespace()
        backend.decoder = decoders.BPEDecoder(suffix="</w>")
        trainer = tokenizers.trainers.BpeTrainer(end_of_word_suffix="</w>", **options)
    else:
        assert kind == "byte_fallback"
        backend = tokenizers.Tokenizer(
            tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        )
        steps = [normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence(steps)
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        steps += [decoders.Strip(" ", 1, 0)] * prefix
        backend.decoder = decoders.Sequence(steps)
        options |= {"special_tokens": [*options["special_tokens"], *spelled_bytes]}
        options |= {"vocab_size": 500, "max_token_length": 8}
        trainer = tokenizers.trainers.BpeTrainer(**options)
    texts = ["to be or not to be, that is it. " * 30, "Größe and naïve, don't! " * 9]
    backend.train_from_iterator(texts, trainer)
    if kind == "byte_fallback":  # they are plain tokens of the model, as in SentencePiece
        settings = json.loads(backend.to_str())
        own = {END_OF_TEXT, "<unk>"}
        settings["added_tokens"] = [t for t in settings["added_tokens"] if t["content"] in own]
        backend = tokenizers.Tokenizer.from_str(json.dumps(settings))
    return Tokenizer(backend, END_OF_TEXT)


FAMILIES = {
    (kind, prefix): trained(kind, prefix=prefix)
    for kind in ("byte_level", "byte_fallback", "unigram", "wordpiece", "words", "end_of_word")
    for prefix in (True, False)
}
written_text = st.lists(
    st.sampled_from(["to", "be", " ", "  ", "ö", "don't", ".", "大", "😀", "\n", "é", "a", " ?"]),
    max_size=12,
).map("".join)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@settings(deadline=None, max_examples=60)
@given(texts=st.lists(written_text, max_size=4))
def test_the_bytes_of_tokens_are_those_of_the_decoded_documents(family, texts):
    tokenizer = FAMILIES[family]
    documents = tokenizer.encode_documents(texts)
    decode = tokenizer.backend.decode
    sizes = [len(decode(ids.tolist(), skip_special_tokens=True).encode()) for ids in documents]
    whole = np.concatenate([*documents, np.empty(0, np.int64)]).astype(np.int64)
    assert tokenizer.count_bytes(whole) == sum(sizes)
    assert [tokenizer.count_bytes(ids) for ids in documents] == sizes
    assert [tokenizer.count_bytes(ids[1:], before=int(ids[0])) for ids in documents] == sizes


@pytest.mark.parametrize("family", [f for f in FAMILIES if f[0] != "end_of_word"], ids=str)
@settings(deadline=None, max_examples=40)
@given(texts=st.lists(written_text, min_size=1, max_size=3), data=st.data())
def test_the_bytes_of_the_parts_add_up_wherever_tokens_are_cut(family, texts, data):
    tokenizer = FAMILIES[family]
    ids = np.concatenate(tokenizer.encode_documents(texts))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=4)))
    unknown = tokenizer.backend.token_to_id("<unk>")  # special: it does not tell what came before
    cuts = [cut for cut in cuts if cut == 0 or ids[cut - 1] != unknown]
    parts = [
        tokenizer.count_bytes(ids[start:stop], before=int(ids[start - 1]) if start else None)
        for start, stop in zip([0, *cuts], [*cuts, len(ids)], strict=True)
    ]
    assert sum(parts) == tokenizer.count_bytes(ids)


@settings(deadline=None, max_examples=60)
@given(texts=st.lists(any_text, max_size=4))
def test_the_bytes_of_byte_level_and_byte_fallback_tokens_are_those_of_the_text(texts):
    size = sum(len(text.encode()) for text in texts)
    assert TRAINED.count_bytes(np.concatenate([*TRAINED.encode_documents(texts), []])) == size
    fallback = FAMILIES["byte_fallback", True]
    assert fallback.count_bytes(np.concatenate([*fallback.encode_documents(texts), []])) == size


def test_a_cut_byte_fallback_counts_one_byte_per_token():
    tokenizer = FAMILIES["byte_fallback", True]
    ids = tokenizer.encode_documents(["大"])[0]
    assert ids.shape == (5,)  # end of text, the prefix, three bytes
    assert [tokenizer.count_bytes(ids[:stop]) for stop in range(6)] == [0, 0, 0, 1, 2, 3]


def test_an_added_token_counts_the_bytes_of_its_spelling():
    backend = tokenizers.Tokenizer.from_str(TRAINED.backend.to_str())
    backend.add_tokens(["naïve", "大大", "plain"])  # `ï` is a character of byte-level tokens too
    tokenizer = Tokenizer(backend, END_OF_TEXT)
    for text in ("a naïve é", "大大 ï", "plain", "naïvenaïve"):
        ids = tokenizer.encode_documents([text])[0]
        assert tokenizer.count_bytes(ids) == len(text.encode())
