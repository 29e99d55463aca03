"""Settings that follow from the text of a run: prompts are its first words."""

import dataclasses

import numpy as np
import pytest
from accelerate import Accelerator

from pretrain_lib import GPT2, open_corpus, open_foreign
from pretrain_lib.corpus.corpus import build_dataset
from pretrain_lib.corpus.fit import PROMPT_TOKENS, first_words, fit_to_text
from pretrain_lib.data.inspection import inspect_data
from pretrain_lib.data.tokens.arrays import open_split
from pretrain_lib.training.banner import banner
from tests.conftest import change


def test_prompts_are_the_first_words_of_held_out_documents(recipe, prepared):
    corpus = open_corpus(recipe)
    tokens = open_split(prepared, "validation")
    text = corpus.tokenizer.decode(tokens.read(0, len(tokens)))
    documents = text.split("<|endoftext|>")[1:]
    prompts = first_words(corpus)
    assert len(prompts) == 2
    for prompt, document in zip(prompts, documents, strict=False):
        assert document.startswith(prompt) and prompt
        assert len(corpus.tokenizer.encode(prompt)) <= PROMPT_TOKENS


def test_without_held_out_text_they_come_from_the_training_text(recipe, prepared):
    corpus = open_corpus(change(recipe, data={"validation": "none"}))
    tokens = open_split(prepared, "train")
    text = corpus.tokenizer.decode(tokens.read(1, 100))
    assert text.startswith(first_words(corpus)[0])


def test_an_array_without_documents_or_tokenizer_has_some_or_none(recipe, prepared, tmp_path):
    ids = open_split(prepared, "train").read(0, 4000)
    np.save(tmp_path / "train.npy", ids)
    data = {"path": str(tmp_path / "train.npy"), "validation": "none"}
    corpus = open_corpus(change(recipe, data=data))
    assert first_words(corpus) == []
    corpus = dataclasses.replace(corpus, tokenizer=open_corpus(recipe).tokenizer)
    assert len(first_words(corpus)) == 2


@pytest.mark.parametrize("at_end", [False, True], ids=["prepared", "datatrove"])
def test_prompts_stay_within_documents_wherever_the_mark_is(recipe, tmp_path, at_end):
    """The end-of-text token stands before each document, or as datatrove writes it, behind it."""
    known = open_corpus(recipe)
    tokenizer = known.tokenizer
    texts = ["", "def a", "class number(one): return a number and another", "x"]
    mark, parts = [tokenizer.end_of_text_id], [tokenizer.encode(text) for text in texts]
    assert len(parts[2]) > PROMPT_TOKENS > len(parts[1])
    parts = [part + mark if at_end else mark + part for part in parts]
    np.concatenate(parts).astype("<u2").tofile(tmp_path / "a.ds")
    np.cumsum([len(part) for part in parts]).astype("<u8").tofile(tmp_path / "a.ds.index")
    tokens = open_foreign(tmp_path / "a.ds", vocabulary_size=None, dtype="uint16")
    corpus = dataclasses.replace(known, train=(tokens,), validation=())
    expected = [texts[1], tokenizer.decode(tokenizer.encode(texts[2])[:PROMPT_TOKENS])]
    assert first_words(corpus) == expected


@pytest.fixture
def padded(recipe, tmp_path, monkeypatch):
    """A recipe of one epoch over 400 documents of 42 tokens, of which a window holds one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (np.arange(400 * 42) % 500).astype("<u2").tofile(tmp_path / "a.ds")
    np.arange(42, 400 * 42 + 1, 42, dtype="<u8").tofile(tmp_path / "a.ds.index")
    data = {"path": str(tmp_path / "a.ds"), "validation": "none", "packing": "best_fit"}
    schedule = {"tokens": None, "epochs": 1.0, "warmup_tokens": None, "warmup_fraction": 0.1}
    config = change(recipe, data=data, schedule=schedule, model={"context_length": 64})
    return change(config, batch={"sequence_length": 64})


def test_an_epoch_of_best_fit_reads_each_window_once(padded):
    corpus = open_corpus(padded)
    config = fit_to_text(padded, corpus)
    dataset = build_dataset(config, corpus)
    steps, per_step = config.last_step(), config.batch.tokens // 64
    windows = dataset.batch(range(steps * per_step))["input_ids"]
    read = sorted(int(window[0]) for window in windows)
    assert read == sorted(42 * document % 500 for document in range(400))
    assert "of which the schedule reads 100.0%, each at most once" in "".join(
        banner(config, GPT2(config.model), corpus, dataset, Accelerator(cpu=True))
    )
    concat = change(padded, data={"packing": "concat"})
    corpus = open_corpus(concat)
    assert fit_to_text(concat, corpus).schedule.tokens == 400 * 42


def test_inspect_tells_the_epochs_that_a_run_was_given(padded, prepared, tmp_path):
    options = {"path": str(prepared), "validation": "hash:0.1"}
    config = change(padded, data=options, schedule={"epochs": 2.0})
    corpus = open_corpus(config)
    tokens = fit_to_text(config, corpus).schedule.tokens
    assert tokens > 2 * sum(map(len, corpus.train))
    shape = {"sequence_length": 64, "window": 0, "planned_tokens": tokens}
    lines = list(inspect_data([prepared], packing="best_fit", **shape))
    assert f"            100.0% of them from {prepared}: 2.00 epochs" in lines
