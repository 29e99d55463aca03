"""A model and a tokenizer in one folder: the ids of training are those of every tool, or refused.

transformers loads some families with a tokenizer of their own, whatever the tokenizer's files say.
"""

import dataclasses
import json

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import pretrain_lib as pl
from pretrain_lib.export.check import write_expected
from pretrain_lib.export.export import export_checkpoint
from pretrain_lib.export.reload import find_problems
from pretrain_lib.models import any_model
from tests.conftest import change, write_text_and_tasks

pytestmark = pytest.mark.moderate

TEXTS = ["Once upon a time, there were 12,345 words.", "def f(x):\n    return x + 12345", " x  y\n"]
WORDS = [*TEXTS, "some more words to learn from, and 67890 of them"] * 9
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TAKING_ANY = ("qwen3", "olmo2", "gpt_neox", "mistral", "phi3", "opt")


def byte_level():
    return pl.train_tokenizer(WORDS, vocabulary_size=330)


def of_qwen2():
    tokenizer = byte_level()
    words = pre_tokenizers.Split(tokenizers.Regex(QWEN2_WORDS), "isolated")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend.pre_tokenizer = pre_tokenizers.Sequence([words, in_bytes])
    tokenizer.backend.normalizer = normalizers.NFC()
    return tokenizer


def of_sentencepiece():
    backend = tokenizers.Tokenizer(models.BPE(unk_token="</s>", byte_fallback=True))
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(spaces)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    special = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return trained(backend, tokenizers.trainers.BpeTrainer(special_tokens=special, vocab_size=330))


def unigram():
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    options = {"special_tokens": ["</s>"], "unk_token": "</s>", "vocab_size": 120}
    return trained(backend, tokenizers.trainers.UnigramTrainer(**options))


def trained(backend, trainer):
    backend.train_from_iterator(WORDS, trainer)
    return pl.Tokenizer(backend, "</s>")


OTHERS = {each.__name__: each for each in (byte_level, of_sentencepiece, unigram)}
PAIRS = [(family, make) for family in TAKING_ANY for make in OTHERS.values()]
PAIRS += [("qwen2", of_qwen2), ("olmo2", of_qwen2)]


def adapter(family, tokenizer):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2}
    sizes |= {"vocab_size": tokenizer.vocabulary_size, "max_position_embeddings": 64}
    sizes |= {"word_embed_proj_dim": 16} if family == "opt" else {"intermediate_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **sizes, pad_token_id=None)
        return pl.CausalLMAdapter(AutoModelForCausalLM.from_config(config)).eval()


def save(folder, model, tokenizer):
    optimizer = pl.build_adamw(model, learning_rate=1e-2)
    state = pl.TrainingState(step=1)
    options = {"tokenizer": tokenizer, "manifest": {"config": {"model": {"config": {}}}}}
    return pl.save_checkpoint(folder, state, model, optimizer, **options)


@pytest.mark.parametrize(
    ("family", "make"), PAIRS, ids=lambda value: getattr(value, "__name__", value)
)
def test_the_ids_of_training_are_those_of_the_checkpoint_and_the_folder(family, make, tmp_path):
    tokenizer = make()
    expected = [tokenizer.encode(text) for text in TEXTS]
    model = adapter(family, tokenizer)
    pl.save_pretrained(model, tmp_path / "folder", tokenizer=tokenizer)
    path = save(tmp_path, model, tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert [theirs(text)["input_ids"] for text in TEXTS] == expected
    for folder in (tmp_path / "folder", path):
        assert [pl.load_tokenizer(folder).encode(text) for text in TEXTS] == expected


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_a_family_with_a_tokenizer_of_its_own_takes_no_other(make, tmp_path):
    tokenizer = make()
    model = adapter("qwen2", tokenizer)
    with pytest.raises(ValueError, match="^model_type=qwen2 does not go with .* such as qwen3"):
        pl.save_pretrained(model, tmp_path / "folder", tokenizer=tokenizer)
    assert not (tmp_path / "folder").exists()
    path = save(tmp_path, model, tokenizer)  # a loop of one's own
    loaded = pl.load_tokenizer(path)
    assert [loaded.encode(t) for t in TEXTS] == [tokenizer.encode(t) for t in TEXTS]
    with pytest.raises(ValueError, match="^model_type=qwen2 does not go with "):
        export_checkpoint(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_transformers_does_with_a_family_is_asked_not_listed():
    config = pl.CausalLMConfig(config={"model_type": "qwen3_5_moe_text"})
    with pytest.raises(ValueError, match="^model_type=qwen3_5_moe_text does not go with "):
        any_model.check_pair(config, byte_level())


def test_a_run_with_another_tokenizer_is_refused_before_its_text_is_prepared(recipe, tmp_path):
    tokenizer = byte_level()
    tokenizer.save(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text("\n".join(WORDS))
    fields = adapter("qwen2", tokenizer).config.hf.to_dict()
    model = pl.CausalLMConfig(config=fields)
    source = {"path": str(tmp_path / "data"), "source": str(tmp_path / "a.txt")}
    named = source | {"tokenizer": str(tmp_path / "tokenizer"), "validation": "none"}
    config = dataclasses.replace(change(recipe, data=named), model=model)
    with pytest.raises(ValueError, match="^model_type=qwen2 does not go with the tokenizer"):
        pl.open_corpus(config)
    assert not (tmp_path / "data").exists()


def test_a_run_on_prepared_text_of_another_tokenizer_is_refused(recipe, prepared):
    fields = adapter("qwen2", pl.load_tokenizer(prepared / "tokenizer")).config.hf.to_dict()
    with pytest.raises(ValueError, match="^model_type=qwen2 does not go with the tokenizer"):
        pl.open_corpus(dataclasses.replace(recipe, model=pl.CausalLMConfig(config=fields)))


def test_a_checkpoint_is_scored_with_the_ids_of_training(tmp_path):
    tokenizer = write_text_and_tasks(tmp_path, items=6)
    model, names = adapter("qwen2", tokenizer), ["heldout_choice", "heldout_perplexity"]
    path = save(tmp_path, model, tokenizer)
    options = {"include_path": tmp_path / "tasks", "device": "cpu"}
    found = pl.evaluate_folder(path, names, **options)
    live = pl.evaluate_model(
        model, tokenizer, pl.open_tasks(names, include_path=tmp_path / "tasks")
    )
    for name, metric in (
        ("heldout_choice", "acc,none"),
        ("heldout_perplexity", "bits_per_byte,none"),
    ):
        theirs, ours = found["results"][name][metric], live["results"][name][metric]
        assert theirs == pytest.approx(ours, rel=1e-5)
    json.dumps(found["config"]["model_args"])


def test_the_check_of_an_export_compares_with_the_tokenizer_of_training(tmp_path, monkeypatch):
    tokenizer = byte_level()
    model = adapter("qwen2", tokenizer)
    monkeypatch.setattr(any_model, "check_pair", lambda *_: None)
    pl.save_pretrained(model, tmp_path / "folder", tokenizer=tokenizer)
    (tmp_path / "expected").mkdir()
    write_expected(model, tmp_path / "expected", tokenizer=tokenizer, dtype=torch.float32)
    problems, _ = find_problems(tmp_path / "folder", tmp_path / "expected")
    for part in ("normalizer", "pre-tokenizer"):
        assert f"the loaded tokenizer has another {part}" in problems
