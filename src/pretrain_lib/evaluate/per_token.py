"""Accuracy by log-likelihood per token, in addition to lm-eval's `acc_norm`.

lm-eval's `acc_norm` divides the log-likelihood of an ending by its number of characters. GPT-3
(Brown et al. 2020, section 2.4) and scripts like nanoGPT's divide by its number of tokens, under
the same name, which gives a different accuracy.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

METRIC = "acc_norm_per_token"
BESIDE = "acc_norm"  # METRIC is added to the tasks for which lm-eval reports this


def add_per_token(results: dict, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Add `acc_norm_per_token` and its stderr to lm-eval's results and samples, in place.

    Tasks with an `acc_norm` get it, computed from the log-likelihoods that lm-eval has summed,
    divided by the number of tokens of each ending.
    """
    for task, samples in results["samples"].items():
        scored = [sample for sample in samples if BESIDE in sample["metrics"]]
        if not scored:
            continue
        pairs = [tuple(pair) for sample in scored for pair in _of_context(sample, "arguments")]
        counts = iter(count_ending_tokens(pairs, tokenizer))
        for sample in scored:
            responses = _of_context(sample, "filtered_resps")
            scores = [nats / next(counts) for nats, _ in responses]
            sample[METRIC] = float(_is_right(sample, scores.index(max(scores))))
            sample["metrics"] = [*sample["metrics"], METRIC]
        for kind in dict.fromkeys(sample["filter"] for sample in scored):
            hits = [sample[METRIC] for sample in scored if sample["filter"] == kind]
            mean, error = _mean_and_error(hits)
            results["results"][task] |= {
                f"{METRIC},{kind}": mean,
                f"{METRIC}_stderr,{kind}": error,
            }
        results["higher_is_better"][task][METRIC] = True


def count_ending_tokens(
    pairs: Sequence[tuple[str, str]], tokenizer: "PreTrainedTokenizerBase"
) -> list[int]:
    """Return the number of tokens that lm-eval scores for each `(context, ending)`.

    It is the number of tokens of the concatenation minus that of the context without its trailing
    spaces.
    """
    texts = dict.fromkeys(text for c, e in pairs for text in (c.rstrip(), c + e) if text)
    lengths = {"": 0}
    if texts:
        output = tokenizer(
            [*texts], add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        lengths |= {text: len(ids) for text, ids in zip(texts, output["input_ids"], strict=True)}
    return [lengths[context + ending] - lengths[context.rstrip()] for context, ending in pairs]


def _of_context(sample: dict, part: str) -> list:
    """Return the entries of `sample[part]` for the endings after their context.

    For `acc_mutual_info` lm-eval adds as many requests without the context.
    """
    return sample[part][: len(sample[part]) // (1 + ("acc_mutual_info" in sample["metrics"]))]


def _is_right(sample: dict, choice: int) -> bool:
    target = sample["target"]
    if isinstance(target, str):  # the text of the ending, without the target delimiter
        return sample["arguments"][choice][1].strip() == target.strip()
    return choice in target if isinstance(target, list) else choice == target


def _mean_and_error(values: list[float]) -> tuple[float, float | str]:
    """Return the mean and its standard error as in lm-eval: N/A for a single value."""
    mean, count = sum(values) / len(values), len(values)
    if count < 2:
        return mean, "N/A"
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    return mean, math.sqrt(variance / count)
