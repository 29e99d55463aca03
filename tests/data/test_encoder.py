"""The encoder: the tokenizer's own ids, by a faster library where it gives them, cut or not."""

import json
import random
import re
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, normalizers, pre_tokenizers

from pretrain_lib.data.prepare import job as job_module
from pretrain_lib.data.prepare.job import Job
from pretrain_lib.data.prepare.prepare import prepare
from pretrain_lib.data.text import encoder as encoder_module
from pretrain_lib.data.text import equivalence
from pretrain_lib.data.text.encoder import (
    CachingEncoder,
    Encoder,
    choose_encoder,
    cut_text,
    load_encoder,
)
from pretrain_lib.data.text.equivalence import (
    GPT4_WORDS,
    HARD_TEXTS,
    KNOWN_WORDS,
    NEW_CHARACTERS,
    as_tiktoken,
    has_new_characters,
)
from pretrain_lib.data.text.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer, train_tokenizer

pytestmark = pytest.mark.moderate

CODE = Path(json.decoder.__file__).read_text()
DRAW = random.Random(0)
CORPORA = {
    "code": [CODE],
    "words": ["to be or not to be, that's the question: 1999 times. " * 50],
    "many scripts": ["Größe, 大きさ, размер, גודל, 크기 😀\u200d🚀\n\n\t" * 50],
    "noise": ["".join(DRAW.choices("ab \n", k=20_000))],
    "repeats": ["a" * 50 + " " * 50 + "\n" * 50] * 5,
    "bytes": ["".join(map(chr, DRAW.choices(range(1, 0x3000), k=5000)))],
}
TEXTS = [text for texts in CORPORA.values() for text in texts]


def split_by(pattern, behavior="isolated", **options):
    words = pre_tokenizers.Split(Regex(pattern), behavior, **options)
    return pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


WORDS = {
    "GPT-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "GPT-4": split_by(GPT4_WORDS),
    **{f"pattern {i}": split_by(pattern) for i, pattern in enumerate(sorted(KNOWN_WORDS))},
}


def train(texts=TEXTS, *, words="GPT-2", size=700):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = WORDS.get(words, words)
    backend.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, END_OF_TEXT)


def from_merges(merges, *, words="GPT-2"):
    """Return a BPE of the bytes and some merges of spelled bytes, ids in that order."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = WORDS[words]
    backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend, END_OF_TEXT)


def edited(edit):
    """Return the trained GPT-2-like tokenizer with something changed in its JSON."""
    content = json.loads(GPT2_LIKE.backend.to_str())
    edit(content)
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)), END_OF_TEXT)


def ids_of(encoder, texts):
    ids, ends = encoder.encode([text.encode() for text in texts])
    assert ids.dtype == encoder.dtype
    return [row.tolist() for row in np.split(ids, ends[:-1])] if texts else ids.tolist()


def own_ids(tokenizer, texts):
    return [ids.tolist() for ids in tokenizer.encode_documents(texts)]


GPT2_LIKE, GPT4_LIKE = train(), train(words="GPT-4")
ENCODERS = [choose_encoder(tokenizer, TEXTS) for tokenizer in (GPT2_LIKE, GPT4_LIKE)]
BY_TIKTOKEN = [Encoder(e.tokenizer, as_tiktoken(e.tokenizer), cuts_text=True) for e in ENCODERS]
SLOW = [Encoder(encoder.tokenizer, None, cuts_text=True) for encoder in ENCODERS]
EVERY = [*ENCODERS, *BY_TIKTOKEN, *SLOW]
LIBRARIES = [package for package in ("gigatoken", "tiktoken", "tokenizers") for _ in range(2)]

any_character = st.characters(exclude_categories=["Cs"])
pieces = st.one_of(
    st.text(any_character),
    st.sampled_from(CODE.split(" ")),
    st.sampled_from([" ", "\n", "\r\n", "\t", "\u3000", "\x85", "a", "9", ".", "x'S", "'ſt", "é"]),
    st.sampled_from([END_OF_TEXT, "don't we'LL I'm", "e\u0301", "क्षि", "\u200d", "\u0345"]),
    st.tuples(st.sampled_from(" \na9.!你"), st.integers(1, 2000)).map(lambda x: x[0] * x[1]),
)
any_text = st.lists(pieces, max_size=12).map("".join)


@settings(deadline=None, max_examples=200)
@given(texts=st.lists(any_text, max_size=4))
def test_ids_are_the_tokenizers_own_whatever_the_text(texts):
    for encoder in EVERY:
        assert ids_of(encoder, texts) == own_ids(encoder.tokenizer, texts)


def test_every_library_is_compared_above():
    assert [encoder.package for encoder in EVERY] == LIBRARIES
    assert all(encoder.cuts_text for encoder in EVERY)


@settings(deadline=None, max_examples=100)
@given(text=any_text, size=st.integers(1, 60))
def test_pieces_of_a_text_have_the_ids_of_the_whole(text, size):
    found = list(cut_text(text, size))
    assert "".join(found) == text
    assert all(len(piece) >= size for piece in found[:-1])
    for tokenizer in (GPT2_LIKE, GPT4_LIKE):
        ids = [i for piece in found for i in tokenizer.encode(piece)]
        assert ids == tokenizer.encode(text)


def test_a_text_is_cut_wherever_it_can_be():
    assert list(cut_text("ab, cd 12\n\n3. 4 5é 6", 3)) == ["ab, cd", " 12", "\n\n3. 4", " 5é 6"]


@pytest.mark.parametrize("encoder", EVERY, ids=range(6))
@settings(deadline=None, max_examples=25)
@given(texts=st.lists(any_text, max_size=6), size=st.integers(1, 200))
def test_ids_do_not_depend_on_how_much_is_encoded_at_once(encoder, texts, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder_module, "PIECE_CHARACTERS", size)
        patch.setattr(encoder_module, "BATCH_BYTES", size)
        assert ids_of(encoder, texts) == own_ids(encoder.tokenizer, texts)


@pytest.mark.parametrize("encoder", EVERY, ids=range(6))
def test_parts_of_a_document_have_the_ids_of_the_whole(encoder):
    parts = list(cut_text(CODE, 1000))
    ids, ends = encoder.encode([part.encode() for part in parts], begins=False)
    assert ids.tolist() == encoder.tokenizer.encode(CODE)
    assert ids.dtype == np.dtype("<u2")
    assert ends.tolist() == np.cumsum([len(encoder.tokenizer.encode(p)) for p in parts]).tolist()
    first, _ = encoder.encode([parts[0].encode()])
    assert first.tolist() == [encoder.tokenizer.end_of_text_id, *ids[: ends[0]].tolist()]


@pytest.mark.parametrize("stretch", [" ", "\n"])
def test_a_stretch_of_white_space_too_long_for_tiktoken_has_the_same_ids(stretch):
    (encoder, _), text = BY_TIKTOKEN, "before" + stretch * 10**6 + "behind"
    with pytest.raises(ValueError, match="stack"):
        encoder.fast.encode(text)
    assert ids_of(encoder, [text]) == own_ids(encoder.tokenizer, [text])


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("corpus", CORPORA)
def test_trained_tokenizers_are_proven_equal_to_tiktoken(corpus, words):
    for size in (257, 300, 1500):
        tokenizer = train(CORPORA[corpus], words=words, size=size)
        encoder = Encoder(tokenizer, as_tiktoken(tokenizer), cuts_text=False)
        assert encoder.package == "tiktoken"
        assert ids_of(encoder, TEXTS) == own_ids(tokenizer, TEXTS)


def test_a_tokenizer_in_the_files_of_gpt2_is_encoded_by_gigatoken(tmp_path):
    GPT2_LIKE.backend.model.save(str(tmp_path))
    tokenizer = load_tokenizer(tmp_path)
    assert as_tiktoken(tokenizer) is not None
    encoder = choose_encoder(tokenizer, [])
    assert encoder.package == "gigatoken"
    assert ids_of(encoder, TEXTS) == own_ids(GPT2_LIKE, TEXTS)


FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)


def swap_merges(content):
    merges = content["model"]["merges"]
    merges[50], merges[51] = merges[51], merges[50]


def swap_ids(content):
    vocabulary = content["model"]["vocab"]
    one, two = list(vocabulary)[400:402]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]


def drop_a_merge(content):
    content["model"]["merges"].pop()


def add_a_token(content, special=False):
    token = {"id": 9999, "content": "question", "special": special}
    content["added_tokens"].append(token | FLAGS)


def mark_as_special(content):
    """Make a token special that the merges can make too."""
    token, number = list(content["model"]["vocab"].items())[300]
    content["added_tokens"].append({"id": number, "content": token, "special": True} | FLAGS)


def spell_a_token_otherwise(content):
    vocabulary = content["model"]["vocab"]
    vocabulary["▁the"] = max(vocabulary.values()) + 1


def set_in(*path, value):
    def edit(content):
        for name in path[:-1]:
            content = content[name]
        content[path[-1]] = value

    return edit


NFC = {"type": "NFC"}
PREFIX = json.loads(pre_tokenizers.ByteLevel(add_prefix_space=True).__getstate__())
REFUSED = {
    "merges in another order": swap_merges,
    "ids in another order": swap_ids,
    "a token that no merge makes": drop_a_merge,
    "an added token": add_a_token,
    "a special token among the merges": mark_as_special,
    "a token that is not spelled in bytes": spell_a_token_otherwise,
    "a normalizer": set_in("normalizer", value=NFC),
    "a prefix space": set_in("pre_tokenizer", value=PREFIX),
    "no pre-tokenizer": set_in("pre_tokenizer", value=None),
    "merges left out at random": set_in("model", "dropout", value=0.5),
    "a mark for what ends a word": set_in("model", "end_of_word_suffix", value="</w>"),
}


# The merges of these are applied alike by `gigatoken`, which takes the list as it is.
OTHER_MERGES = {
    "merges in another order",
    "ids in another order",
    "a token that no merge makes",
    "a special token among the merges",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_proven_equal_is_not_left_to_tiktoken(name):
    tokenizer = edited(REFUSED[name])
    assert as_tiktoken(tokenizer) is None
    encoder = choose_encoder(tokenizer, [])
    assert encoder.package == ("gigatoken" if name in OTHER_MERGES else "tokenizers")
    if name in OTHER_MERGES:
        texts = [*TEXTS, *HARD_TEXTS]
        assert ids_of(encoder, texts) == own_ids(tokenizer, texts)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), words=st.sampled_from(["GPT-2", "GPT-4"]))
def test_any_list_of_merges_is_applied_alike(data, words):
    tokens, merges = list("abcd"), []
    for _ in range(data.draw(st.integers(1, 30))):
        pair = data.draw(st.tuples(st.sampled_from(tokens), st.sampled_from(tokens)))
        if pair not in merges and len(pair[0] + pair[1]) < 12:
            merges.append(pair)
            tokens.append(pair[0] + pair[1])
    tokenizer = from_merges(merges, words=words)
    encoder = choose_encoder(tokenizer, [])
    assert encoder.package == "gigatoken"
    texts = data.draw(st.lists(st.text("abcd ", max_size=40), min_size=1, max_size=20))
    assert ids_of(encoder, texts) == own_ids(tokenizer, texts)


def test_more_special_tokens_are_no_hindrance():
    tokenizer = edited(lambda content: add_a_token(content, special=True))
    encoder = choose_encoder(tokenizer, [])
    assert encoder.package == "gigatoken"
    texts = ["a question is asked", *TEXTS]
    assert ids_of(encoder, texts) == own_ids(tokenizer, texts)


@pytest.mark.parametrize(
    "words",
    [
        split_by(r"\p{L}+| +"),  # what no match covers, `tiktoken` would drop
        split_by(r"^\s+|\S+|\s+"),  # `^` is not the same place to both
        split_by(r"\w+|[^\w\s]+|\s+"),
        split_by(GPT4_WORDS, behavior="merged_with_next"),
        split_by(GPT4_WORDS, invert=True),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(), WORDS["GPT-2"]]),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        pre_tokenizers.Metaspace(),
    ],
    ids=range(8),
)
def test_other_splits_into_words_are_left_to_tokenizers(words):
    assert choose_encoder(train(words=words), []).package == "tokenizers"


def test_merges_that_ranks_alone_would_make_otherwise_are_not_left_to_tiktoken(monkeypatch):
    tokenizer = from_merges([("a", "b"), ("b", "c"), ("a", "bc")])
    assert as_tiktoken(tokenizer) is None
    assert as_tiktoken(from_merges([("a", "b"), ("b", "c"), ("ab", "c")])) is not None
    # Rightly so; and without the proof a sample would still tell.
    monkeypatch.setattr(equivalence, "_makes_the_same_merges", lambda *_: True)
    monkeypatch.setattr(encoder_module, "has_gigatoken_shape", lambda _: False)
    unproven = choose_encoder(tokenizer, ["xyz"])
    assert ids_of(unproven, ["abc"]) != own_ids(tokenizer, ["abc"])
    assert choose_encoder(tokenizer, ["xyz", "abc"]).package == "tokenizers"


def test_ids_of_gigatoken_that_differ_on_a_hard_text_refuse_it(monkeypatch):
    # Without a pre-tokenizer, `gigatoken` would still split words.
    tokenizer = edited(REFUSED["no pre-tokenizer"])
    monkeypatch.setattr(encoder_module, "has_gigatoken_shape", lambda _: True)
    assert ids_of(Encoder(tokenizer, CachingEncoder(tokenizer), cuts_text=False), ["xyz"])
    assert choose_encoder(tokenizer, []).package == "tokenizers"


def test_a_pattern_that_gigatoken_does_not_know_is_left_to_tiktoken():
    chosen = {words: choose_encoder(train(words=words), []).package for words in WORDS}
    assert set(chosen.values()) == {"gigatoken", "tiktoken"}
    assert chosen["GPT-2"] == chosen["GPT-4"] == "gigatoken"


def is_new(character):
    return re.match(f"[{NEW_CHARACTERS}]", character)


def test_every_character_that_is_seen_otherwise_is_found():
    characters = [chr(i) for i in [*range(0xD800), *range(0xE000, 0x40000)]]
    new = [c for c in characters if is_new(c)]
    assert len(new) > 4000
    found = [c for c in characters if has_new_characters(f"a{c}b".encode())]
    assert found == new


def test_only_the_pieces_of_a_text_that_are_seen_otherwise_are_left_to_tokenizers(monkeypatch):
    tokenizer = train()
    encoder, taken = choose_encoder(tokenizer, []), []
    assert (encoder.package, encoder.cuts_text) == ("gigatoken", True)
    text = (
        ("one of the 12 words\n" * 20_000) + "a\u088fb \U000323b0c" + (" and more words" * 20_000)
    )
    expected = tokenizer.encode_documents([text])[0]
    plain = Tokenizer.encode_documents
    monkeypatch.setattr(
        Tokenizer, "encode_documents", lambda self, texts: taken.extend(texts) or plain(self, texts)
    )
    assert np.array_equal(encoder.encode([text.encode()])[0], expected)
    assert sum(map(len, taken)) < 2**17 < len(text)


def like_sentencepiece(kind):
    """Return a BPE with byte fallback as those converted from SentencePiece are."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    specials = ["<unk>", "<s>", "</s>", *fallback]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=900, special_tokens=specials, show_progress=False
    )
    trained.train_from_iterator(TEXTS[:3], trainer)
    content = json.loads(trained.to_str())
    content["model"] |= {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
    content["added_tokens"] = content["added_tokens"][:3]
    content["pre_tokenizer"] = None
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    if kind == "normalizer":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence(steps)
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    return Tokenizer(backend, "</s>")


LIKE_SENTENCEPIECE = [
    choose_encoder(like_sentencepiece(kind), TEXTS)
    for kind in ("normalizer", "first", "always", "never")
]


@settings(deadline=None, max_examples=60)
@given(texts=st.lists(any_text, min_size=1, max_size=4))
def test_ids_with_byte_fallback_are_the_tokenizers_own(texts):
    for encoder in LIKE_SENTENCEPIECE:
        assert encoder.package == "gigatoken"
        assert ids_of(encoder, texts) == own_ids(encoder.tokenizer, texts)


def with_normalizer(normalizer):
    tokenizer = train()
    tokenizer.backend.normalizer = normalizer
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [
        train(words=pre_tokenizers.ByteLevel(add_prefix_space=True)),
        train(words=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
        train(words=pre_tokenizers.Metaspace()),
        with_normalizer(normalizers.Strip()),
        with_normalizer(normalizers.Prepend("_")),
    ],
    ids=["prefix space", "words together", "metaspace", "strip", "prepend"],
)
@pytest.mark.parametrize("sample", [[], ["你好。\n" * 100], [CODE]], ids=["no", "Chinese", "code"])
def test_text_is_not_cut_for_tokenizers_whose_ids_that_moves(tokenizer, sample):
    encoder = choose_encoder(tokenizer, sample)
    assert not encoder.cuts_text
    long_text = "to be or not to be " * 100
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder_module, "PIECE_CHARACTERS", 10)
        assert ids_of(encoder, [long_text]) == own_ids(tokenizer, [long_text])


def test_an_encoder_is_loaded_once_but_anew_for_another_tokenizer(tmp_path):
    folder, options = tmp_path / "tokenizer", {"package": "gigatoken", "cuts_text": True}
    GPT2_LIKE.save(folder)
    first = load_encoder(folder, **options)
    assert load_encoder(folder, **options) is first
    other = train_tokenizer(CORPORA["words"], vocabulary_size=300)
    other.save(folder)
    for package in ("gigatoken", "tiktoken", "tokenizers"):
        second = load_encoder(folder, package=package, cuts_text=True)
        assert second.package == package
        assert second.tokenizer.sha256 == other.sha256
        assert ids_of(second, TEXTS) == own_ids(other, TEXTS)


def test_a_prepared_folder_does_not_depend_on_the_library(tmp_path, monkeypatch):
    texts = [text[:i] + " \u0cdc\u20e8" * (i % 2) for text in TEXTS for i in (1, 10, 500, 5000)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "text.jsonl").write_text("".join(lines))
    (tmp_path / "long.txt").write_text(CODE * 3)
    GPT4_LIKE.save(tmp_path / "tokenizer")
    sources = (str(tmp_path / "text.jsonl"), str(tmp_path / "long.txt"))
    for rule in ("hash:0.3", "first:700"):
        job = Job(sources, tokenizer=str(tmp_path / "tokenizer"), validation=rule)
        found = []
        for used in (ENCODERS[1], BY_TIKTOKEN[1], SLOW[1]):
            monkeypatch.setattr(job_module, "choose_encoder", lambda *_, used=used: used)
            folder = tmp_path / f"{rule}-{used.package}"
            assert prepare(job, folder, workers=1, quiet=True)["encoder"] == used.package
            manifest = json.loads((folder / "manifest.json").read_text())
            assert manifest.pop("manifest_sha256") and manifest.pop("encoder") == used.package
            contents = {path.name: path.read_bytes() for path in folder.rglob("*.*")}
            found.append(contents | {"manifest.json": json.dumps(manifest)})
        assert found[0] == found[1] == found[2]
        assert len(found[0]) > 6


@pytest.mark.slow
@pytest.mark.parametrize("words", ["GPT-2", "GPT-4"])
def test_both_libraries_split_every_character_alike(words):
    # Every pair of bytes is a token, first of all those of which one is a byte of ASCII: so the ids
    # show whether a border between words lies between a character and what stands around it here.
    spelled = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in spelled for b in spelled]
    pairs.sort(key=lambda pair: abs(sum(part.isascii() for part in pair) - 1))
    tokenizer = from_merges(pairs, words=words)
    encoders = [choose_encoder(tokenizer, []), Encoder(tokenizer, as_tiktoken(tokenizer), False)]
    assert [encoder.package for encoder in encoders] == ["gigatoken", "tiktoken"]
    assert encoders[0].dtype == np.dtype("<u4")
    assigned = [*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xE1000)]
    others = range(0x40000, 0x110000, 7)  # planes without a character, or of private use
    characters = [chr(i) for i in sorted({*assigned, *others})]
    # Characters that have to be left to `tokenizers` are in texts of their own.
    new = [c for c in characters if is_new(c)]
    characters = [c for c in characters if not is_new(c)]
    for start in range(0, len(characters), 2**15):
        blocks = [characters[i : i + 2**12] for i in range(start, start + 2**15, 2**12)]
        texts = ["".join(f"a{c}1 {c}.\n'{c}a" for c in block) for block in [*blocks, new[:50]]]
        own = np.concatenate(tokenizer.encode_documents(texts))
        for encoder in encoders:
            assert np.array_equal(encoder.encode([text.encode() for text in texts])[0], own)
    bare = encoders[0].fast.encode([f"a{c}1 {c}.".encode() for c in new])
    assert [ids.tolist() for ids in bare] != [tokenizer.encode(f"a{c}1 {c}.") for c in new]


def encode_words_without_repetition(megabytes):
    """Return by how many bytes this process grows at most while it encodes random words."""
    encoder = Encoder(GPT2_LIKE, CachingEncoder(GPT2_LIKE), cuts_text=True)
    process = psutil.Process()
    before, most, draw = process.memory_info().rss, 0, np.random.default_rng(0)
    for _ in range(megabytes):
        letters = draw.integers(ord("a"), ord("z") + 1, 2**20, dtype=np.uint8)
        letters[9::10] = ord(" ")
        encoder.encode([letters.tobytes()])
        most = max(most, process.memory_info().rss - before)
    return most


@pytest.mark.slow
def test_memory_is_bounded_over_text_that_never_repeats_a_word(monkeypatch):
    bound = 2 * encoder_module.CACHE_BYTES
    with get_context("fork").Pool(1) as pool:
        bounded = pool.apply(encode_words_without_repetition, (80,))
    monkeypatch.setattr(encoder_module, "CACHE_BYTES", 2**62)
    with get_context("fork").Pool(1) as pool:
        unbounded = pool.apply(encode_words_without_repetition, (80,))
    assert bounded < bound < unbounded
