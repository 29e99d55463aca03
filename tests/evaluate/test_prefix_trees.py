"""Endings scored in trees of tokens, against each alone, in float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pretrain_lib import GPT2, Llama
from pretrain_lib.evaluate import scoring
from pretrain_lib.evaluate.prefix_trees import batch_trees, grow_trees, lay_out
from pretrain_lib.evaluate.scoring import score_endings
from tests.models.test_models import SMALL

CONTEXT = 24
# Few different tokens, so that many begin alike.
IDS = st.lists(st.integers(0, 2), min_size=1, max_size=CONTEXT)
REQUESTS = st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=40), IDS))
TOLERANCE = 1e-4  # nats: LLaMA turns in float32, and the softmax is in float32


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request):
    model = (GPT2 if request.param == "gpt2" else Llama)(SMALL[request.param]).initialize(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)  # so that attention looks at some tokens more than at others
    return model.double().eval()


@torch.no_grad()
def score_alone(model, context, ending):
    """Return the log-likelihood of an ending, by a forward of its own over the whole."""
    ids = torch.tensor([*context, *ending])
    logits = model(ids[:-1][-CONTEXT:][None])[0].log_softmax(dim=1)[-len(ending) :]
    expected = logits.gather(1, torch.tensor(ending)[:, None]).sum()
    return float(expected), logits.argmax(dim=1).tolist() == list(ending)


def assert_as_alone(model, requests, batch_size):
    found = dict(score_endings(model, requests, batch_size=batch_size))
    assert sorted(found) == [*range(len(requests))]
    for number, request in enumerate(requests):
        nats, greedy = score_alone(model, *request)
        assert found[number] == (pytest.approx(nats, abs=TOLERANCE), greedy)


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(requests=REQUESTS, batch_size=st.integers(1, 5))
@example(requests=[([1] * 9, [0, 1]), ([1] * 9, [0, 1]), ([1] * 9, [0])], batch_size=1)
@example(requests=[([1] * 20, [0, 1, 2, n]) for n in range(3)] + [([2], [1])], batch_size=8)
@example(requests=[([1] * 40, [0] * n) for n in range(1, CONTEXT + 1)], batch_size=2)
def test_endings_in_trees_score_as_each_alone(model, requests, batch_size):
    assert_as_alone(model, requests, batch_size)


def test_tokens_that_saw_another_branch_would_be_seen(model, monkeypatch):
    """The test above finds a planted fault: a tree that is read as a text."""
    requests = [([1] * 12, [0, 1, 2, n]) for n in range(3)] + [([1] * 12, [2, 2])]
    assert_as_alone(model, requests, 8)
    right = scoring.lay_out
    monkeypatch.setattr(scoring, "lay_out", lambda *args: (right(*args)[0], None))
    with pytest.raises(AssertionError):
        assert_as_alone(model, requests, 8)


def test_logits_in_several_pieces_score_the_same(model, monkeypatch):
    requests = [([1] * 12, [n % 3] * (n + 1)) for n in range(10)]
    whole = dict(score_endings(model, requests, batch_size=8))
    monkeypatch.setattr(scoring, "HEAD_BYTES", 7 * 8 * len(model.head_weight))
    monkeypatch.setattr(scoring, "BLOCK_LOGITS", 200)
    assert dict(score_endings(model, requests, batch_size=8)) == {
        number: (pytest.approx(nats, abs=TOLERANCE), greedy)
        for number, (nats, greedy) in whole.items()
    }


@given(requests=REQUESTS, width=st.sampled_from([1, 32, 10_000]))
def test_trees_hold_what_is_read_for_each_request(requests, width):
    config = replace(SMALL["gpt2"], width=width, num_heads=1)
    trees = grow_trees(requests, config)
    for tree in trees:
        assert len(tree.tokens) <= 2 * CONTEXT
        for number, places in tree.endings:
            context, ending = requests[number]
            # The path to the last token, found by walking up: by depths alone.
            path = [places[-1]]
            while tree.depths[path[0]]:
                above = range(path[0] - 1, -1, -1)
                depth = tree.depths[path[0]] - 1
                path.insert(0, next(i for i in above if tree.depths[i] == depth))
            assert path[-len(ending) :] == places
            assert [tree.tokens[i] for i in path] == [*context, *ending[:-1]][-CONTEXT:]
            for i in range(len(tree.tokens)):
                seen = i <= places[-1] < tree.ends[i]
                assert seen == (i in path)
    numbers = sorted(number for tree in trees for number, _ in tree.endings)
    assert numbers == [*range(len(requests))]


def test_a_context_of_many_is_read_once_for_as_many_as_a_row_takes():
    config = replace(SMALL["gpt2"], width=768, num_heads=12, context_length=1024)
    examples = [*range(600)]  # such as come before every question
    requests = [([*examples, 700 + n, *[5] * 60], [8, 9]) for n in range(100)]
    trees = grow_trees(requests, config)
    assert [len(tree.tokens) for tree in trees] == [600 + 23 * 62] * 4 + [600 + 8 * 62]
    batches = [*batch_trees(trees, 4, config)]
    assert [len(batch) for batch in batches] == [2, 2, 1]
    ids, paths = lay_out(batches[0], config)
    assert ids.shape == paths.depths.shape == paths.ends.shape == (2, 600 + 23 * 62)
    assert int(paths.depths.max()) == 661


def test_a_mask_has_a_limit():
    config = replace(SMALL["gpt2"], width=768, num_heads=12, context_length=8192)
    trees = grow_trees([([*range(7000)], [n] * 1100) for n in range(8)], config)
    assert [len(tree.tokens) for tree in trees] == [7000 + 4 * 1099] * 2
    assert [len(batch) for batch in batch_trees(trees, 8, config)] == [1, 1]
