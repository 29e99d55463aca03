"""A tokenizer.json beside which another class is named: its ids are those of AutoTokenizer."""

import json
import subprocess
import sys

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from pretrain_lib.data.text.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer

CORPUS = ["the quick brown Fox jumps over 12 lazy dogs, isn't it? naïve ÉTÉ\n\n"] * 20
SAMPLES = [
    "the Fox naïve ÉTÉ",
    "  two  spaces\n\nnew\ttab",
    "don't 123 4567 FOO y",
    "",
    *CORPUS[:1],
]
SPECIAL = ["<unk>", "<s>", "</s>", "[SEP]"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def train(model, trainer, pre_tokenizer, normalizer=None, **options):
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer
    if normalizer:
        backend.normalizer = normalizer
    options = {"special_tokens": SPECIAL, "show_progress": False, "vocab_size": 420} | options
    backend.train_from_iterator(CORPUS, trainer(**options))
    return backend


def like_llama_2():
    backend = train(
        models.BPE(unk_token="<unk>"),
        trainers.BpeTrainer,
        pre_tokenizers.Metaspace(),
        special_tokens=[*SPECIAL, *BYTES],
    )
    content = json.loads(backend.to_str())
    content["model"] |= {"byte_fallback": True, "fuse_unk": True}
    content["added_tokens"] = content["added_tokens"][: len(SPECIAL)]
    content["pre_tokenizer"] = None
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return backend


def like_gpt2(normalizer=None, *, prefix=False):
    step = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    options = {"initial_alphabet": step.alphabet()}
    return train(models.BPE(), trainers.BpeTrainer, step, normalizer, **options)


def with_word(backend):
    backend.add_tokens(["FOO"])
    return backend


BERT = train(
    models.WordPiece(unk_token="<unk>"),
    trainers.WordPieceTrainer,
    pre_tokenizers.BertPreTokenizer(),
    normalizers.BertNormalizer(),
)
UNIGRAM = train(
    models.Unigram(), trainers.UnigramTrainer, pre_tokenizers.Metaspace(), unk_token="<unk>"
)
LLAMA, GPT2 = like_llama_2(), like_gpt2()


def says(kind, **settings):
    return {"tokenizer_config": {"tokenizer_class": kind, "eos_token": "</s>", **settings}}


BERT_NAMES = {"unk_token": "<unk>", "sep_token": "[SEP]"}
LLAMA_NAMES = {"unk_token": "<unk>", "bos_token": "<s>"}
CHANGED = {
    "BERT, cased": (BERT, says("BertTokenizer", do_lower_case=False, **BERT_NAMES)),
    "BERT, accents": (BERT, says("BertTokenizerFast", strip_accents=False, **BERT_NAMES)),
    "Llama": (LLAMA, says("LlamaTokenizer", **LLAMA_NAMES)),
    "Llama, no prefix": (LLAMA, says("LlamaTokenizerFast", add_prefix_space=False, **LLAMA_NAMES)),
    "Gemma": (LLAMA, says("GemmaTokenizer", add_prefix_space=False, **LLAMA_NAMES)),
    "GPT-2, lower case": (like_gpt2(normalizers.Lowercase()), says("GPT2Tokenizer")),
    "GPT-2, prefix in the JSON": (like_gpt2(prefix=True), says("GPT2Tokenizer")),
    "GPT-2, fewer added tokens": (
        with_word(like_gpt2()),
        says("GPT2Tokenizer", added_tokens_decoder={}),
    ),
    "Qwen 2": (GPT2, says("Qwen2Tokenizer")),
    "Qwen 2 by its model": (
        GPT2,
        {"tokenizer_config": {"eos_token": "</s>"}, "config": {"model_type": "qwen2"}},
    ),
    "Qwen 2 whatever is named": (
        GPT2,
        says("PreTrainedTokenizerFast") | {"config": {"model_type": "qwen2"}},
    ),
    "the model's class": (
        GPT2,
        {
            "tokenizer_config": {"eos_token": "</s>"},
            "config": {"tokenizer_class": "Qwen2Tokenizer"},
        },
    ),
    "T5": (UNIGRAM, says("T5Tokenizer", unk_token="<unk>")),
    "XLM-R": (UNIGRAM, says("XLMRobertaTokenizer", unk_token="<unk>")),
}
LEFT = {
    "BERT": (BERT, says("BertTokenizer", do_lower_case=True, **BERT_NAMES)),
    "any class, cased": (BERT, says("PreTrainedTokenizerFast", do_lower_case=False)),
    "any class, no prefix": (LLAMA, says("PreTrainedTokenizerFast", add_prefix_space=False)),
    "GPT-2": (GPT2, says("GPT2Tokenizer") | {"config": {"model_type": "gpt2"}}),
    "a model with GPT-2's": (GPT2, says("GPT2TokenizerFast") | {"config": {"model_type": "opt"}}),
    "pieces": (UNIGRAM, says("TokenizersBackend")),
    "another model": (UNIGRAM, says("TokenizersBackend") | {"config": {"model_type": "bert"}}),
    **{
        f"an export of {model}": (
            GPT2,
            says("PreTrainedTokenizerFast") | {"config": {"model_type": model}},
        )
        for model in ("gpt2", "llama", "qwen3", "gpt_neox")
    },
    "the end in a file of its own": (
        GPT2,
        {
            "tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast"},
            "special_tokens_map": {"eos_token": {"content": "<s>", "lstrip": False}},
        },
    ),
    "an end in both": (
        GPT2,
        says("TokenizersBackend") | {"special_tokens_map": {"eos_token": "<s>"}},
    ),
    "an end that is not joined": (
        GPT2,
        says("TokenizersBackend", added_tokens_decoder={})
        | {"special_tokens_map": {"eos_token": "<s>"}},
    ),
}


def write(folder, backend, files):
    for file, content in files.items():
        (folder / f"{file}.json").write_text(json.dumps(content))
    (folder / "tokenizer.json").write_text(backend.to_str())
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("name", [*CHANGED, *LEFT])
def test_the_ids_and_the_end_are_those_of_auto_tokenizer(tmp_path, name):
    backend, files = (CHANGED | LEFT)[name]
    own = write(tmp_path, backend, files)
    loaded, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = [theirs(text, add_special_tokens=False)["input_ids"] for text in SAMPLES]
    assert [loaded.encode(text) for text in SAMPLES] == ids
    assert loaded.end_of_text == theirs.eos_token
    is_left = ids == [own.encode(text, add_special_tokens=False).ids for text in SAMPLES]
    assert is_left == (name in LEFT)
    if is_left:  # with the fingerprint that it has by itself
        alone = tmp_path / "alone"
        alone.mkdir()
        end = {"tokenizer_class": "TokenizersBackend", "eos_token": theirs.eos_token}
        write(alone, backend, {"tokenizer_config": end})
        assert loaded.sha256 == load_tokenizer(alone).sha256


@pytest.mark.parametrize("name", CHANGED)
def test_saved_again_by_transformers_it_is_read_as_it_is(tmp_path, name):
    backend, files = CHANGED[name]
    write(tmp_path, backend, files)
    loaded = load_tokenizer(tmp_path)
    AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert [again.encode(text) for text in SAMPLES] == [loaded.encode(text) for text in SAMPLES]


@pytest.mark.parametrize("kind", ["CTRLTokenizer", "OwnTokenizer"], ids=["Python alone", "code"])
def test_a_class_that_has_no_tokenizer_json_is_refused(tmp_path, kind):
    files = says(kind)
    if kind == "OwnTokenizer":
        files["tokenizer_config"]["auto_map"] = {"AutoTokenizer": ["own.OwnTokenizer", None]}
    write(tmp_path, GPT2, files)
    with pytest.raises(ValueError, match="transformers does not load the folder.*save_pretrained"):
        load_tokenizer(tmp_path)


def test_the_usual_folders_are_read_without_transformers(tmp_path):
    trained = train_tokenizer(CORPUS, vocabulary_size=300)
    trained.save(tmp_path / "saved")
    (tmp_path / "gpt2").mkdir()
    files = says("GPT2Tokenizer") | {"config": {"model_type": "gpt2"}}
    files["tokenizer_config"]["eos_token"] = END_OF_TEXT
    write(tmp_path / "gpt2", trained.backend, files)
    code = (
        "import sys; from pretrain_lib.data.text.tokenizer import load_tokenizer; "
        "[load_tokenizer(name) for name in sys.argv[1:]]; assert 'transformers' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "saved"), str(tmp_path / "gpt2")]
    assert subprocess.run(command, check=False).returncode == 0
