"""Errors of items that a model cannot score: they name the task and the item."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from pretrain_lib.evaluate.prefix_trees import find_fault

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, context, ending


def name_item(item: "Instance") -> str:
    """Return the task and the number of an item, for messages."""
    return f"task {item.task_name}, item {item.doc_id}"


def check_requests(
    items: Sequence["Instance"], requests: Sequence[Request], context_length: int
) -> None:
    """Raise ValueError if a request cannot be scored; without `items` there is none to name."""
    for item, (_, context, ending) in zip(items, requests, strict=bool(items)):
        if fault := find_fault(context, ending, context_length):
            raise ValueError(f"{name_item(item)} {fault}")


@contextmanager
def named_by_harness() -> Iterator[None]:
    """Have lm-eval's `HFLM` check its requests like this library, where it would only assert."""
    from lm_eval.models.huggingface import HFLM

    encode, score = HFLM.loglikelihood, HFLM._loglikelihood_tokens
    items: list[Instance] = []

    def loglikelihood(model: HFLM, instances: Sequence["Instance"], **options: Any) -> list:
        items[:] = instances
        return encode(model, instances, **options)

    def loglikelihood_tokens(model: HFLM, requests: Sequence[Request], **options: Any) -> list:
        check_requests(items, requests, model.max_length)
        items.clear()  # perplexities have no such requests
        return score(model, requests, **options)

    encoding = patch.object(HFLM, "loglikelihood", loglikelihood)
    with encoding, patch.object(HFLM, "_loglikelihood_tokens", loglikelihood_tokens):
        yield
