"""The accuracy by log-likelihood per token of each ending, beside lm-eval's `acc_norm`.

lm-eval's `acc_norm` divides by the characters of an ending. GPT-3 (Brown et al. 2020, 2.4) and the
scripts of nanoGPT's kind divide by its tokens and use the same name: other items come out right.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

METRIC = "acc_norm_per_token"
BESIDE = "acc_norm"  # added where lm-eval reports this


def add_per_token(results: dict, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Add `acc_norm_per_token` and its stderr to the results and samples of lm-eval, in place.

    It comes from the log-likelihoods that lm-eval has summed, divided by the number of tokens of
    each ending, for the tasks that have an `acc_norm`.
    """
    for task, samples in results["samples"].items():
        scored = [sample for sample in samples if BESIDE in sample["metrics"]]
        if not scored:
            continue
        pairs = [tuple(pair) for sample in scored for pair in _of_context(sample, "arguments")]
        counts = iter(count_ending_tokens(pairs, tokenizer))
        for sample in scored:
            found = _of_context(sample, "filtered_resps")
            scores = [nats / next(counts) for nats, _ in found]
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
    """Return how many tokens lm-eval scores of each `(context, ending)`.

    Those of both together less those of the context without the spaces at its end.
    """
    texts = dict.fromkeys(text for c, e in pairs for text in (c.rstrip(), c + e) if text)
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    lengths = {"": 0}
    if texts:
        ids = tokenizer([*texts], **options)["input_ids"]
        lengths |= {text: len(each) for text, each in zip(texts, ids, strict=True)}
    return [lengths[context + ending] - lengths[context.rstrip()] for context, ending in pairs]


def _of_context(sample: dict, part: str) -> list:
    """Return what belongs to the endings after their context.

    For `acc_mutual_info` lm-eval has asked for as many again, without it.
    """
    return sample[part][: len(sample[part]) // (1 + ("acc_mutual_info" in sample["metrics"]))]


def _is_right(sample: dict, choice: int) -> bool:
    target = sample["target"]
    if isinstance(target, str):  # the ending itself, without the delimiter before it
        return sample["arguments"][choice][1].strip() == target.strip()
    return choice in target if isinstance(target, list) else choice == target


def _mean_and_error(values: list[float]) -> tuple[float, float | str]:
    """Return the mean and its standard error as lm-eval estimates it: N/A for a single value."""
    mean, count = sum(values) / len(values), len(values)
    if count < 2:
        return mean, "N/A"
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    return mean, math.sqrt(variance / count)
