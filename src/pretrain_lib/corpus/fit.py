"""Fill in the settings that are null until the text of a run is known."""

import dataclasses
from itertools import islice

import numpy as np

from pretrain_lib.config.settings import Recipe
from pretrain_lib.corpus.paths import Corpus
from pretrain_lib.data.prepare.holdout import parse_validation
from pretrain_lib.data.tokens.foreign import names_tokens

DOCUMENTS = 2  # that prompts are taken from
PROMPT_TOKENS = 8
SEARCHED_TOKENS = 2**16  # of the text, in which the documents must lie


def fit_to_text(config: Recipe, corpus: Corpus) -> Recipe:
    """Return `config` with the length of the run in tokens, and prompts that fit the text.

    `data.validation` becomes the rule by which the text was held out when it was prepared. Raises
    ValueError if the run would be shorter than a step.
    """
    config = config.with_text(_tokens_of_epoch(config, corpus))
    if (rule := _rule_of(config, corpus)) is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, validation=rule))
    if config.samples.prompts is None:
        samples = dataclasses.replace(config.samples, prompts=first_words(corpus))
        config = dataclasses.replace(config, samples=samples)
    return config


def _tokens_of_epoch(config: Recipe, corpus: Corpus) -> int:
    """Return the tokens of all windows of an epoch: those of the text, and best fit's padding."""
    if corpus.plans is None:
        return sum(map(len, corpus.train))
    return sum(plan.num_windows for plan in corpus.plans) * config.batch.sequence_length


def _rule_of(config: Recipe, corpus: Corpus) -> str | None:
    """Return the rule by which all text was held out, None if `data.validation` says the same."""
    stated, rules = config.data.validation, {text.rule for text in corpus.validation}
    if names_tokens(stated) or len(rules) != 1:
        return None
    (rule,) = rules
    return None if parse_validation(rule) == parse_validation(stated) else rule


def first_words(corpus: Corpus) -> list[str]:
    """Return the first words of two documents, held-out ones if there are any.

    Returns none for data without a tokenizer, and for a stream of which nothing is held out.
    """
    texts = [*(held_out.tokens for held_out in corpus.validation), *corpus.train]
    if corpus.tokenizer is None or not texts:
        return []
    tokens, tokenizer = texts[0], corpus.tokenizer
    searched = min(len(tokens), SEARCHED_TOKENS)
    ids = tokens.read(0, searched)
    ends = tokens.document_ends(0, searched) if tokens.has_documents else [searched // DOCUMENTS]
    starts = (_first_ids(document, tokenizer.end_of_text_id) for document in np.split(ids, ends))
    prompts = map(tokenizer.decode, islice(filter(len, starts), DOCUMENTS))
    return [prompt.rstrip("\ufffd") for prompt in prompts]  # a character may have been cut


def _first_ids(document: np.ndarray, end_of_text: int) -> np.ndarray:
    """Return the first ids of a document without the end-of-text token before or behind it."""
    marks = np.flatnonzero(document == end_of_text).tolist()
    first = 1 if marks[:1] == [0] else 0
    return document[first : min([first + PROMPT_TOKENS, *marks[first:]])]
