"""Settings that follow from the text of a run: prompts are its first words."""

import dataclasses

import numpy as np

from pretrain_lib import open_corpus
from pretrain_lib.corpus.fit import PROMPT_TOKENS, first_words
from pretrain_lib.data.tokens.arrays import open_split
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
