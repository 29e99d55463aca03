"""Sampling: greedy equals transformers, and the other ways draw from the right set."""

from collections import Counter

import pytest
import torch
from transformers import GPT2LMHeadModel

from pretrain_lib import GPT2, GPT2Config, generate, load_tokenizer, sample_texts, save_pretrained
from pretrain_lib.generation import _choose

CONFIG = GPT2Config(vocabulary_size=61, context_length=24, num_layers=2, num_heads=2, width=16)


def random_model():
    model = GPT2(CONFIG).initialize(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # so that the likeliest token is not the same everywhere
    return model.eval()


def test_greedy_decoding_is_that_of_transformers(tmp_path):
    model = random_model()
    save_pretrained(model, tmp_path, tokenizer=None)
    other = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    for prompt in ([1, 2, 3], [60], [7, 7, 7, 7, 9]):
        expected = other.generate(
            torch.tensor([prompt]), max_new_tokens=16, do_sample=False, pad_token_id=0
        )[0, len(prompt) :]
        found = generate(model, prompt, new_tokens=16, context_length=24, temperature=0)
        assert found == expected.tolist()


def test_generation_ends_at_the_end_of_text_and_slides_beyond_the_context():
    model = random_model()
    free = generate(model, [1], new_tokens=40, context_length=24, temperature=0)
    assert len(free) == 40
    ended = generate(
        model, [1], new_tokens=40, context_length=24, temperature=0, end_of_text_id=free[5]
    )
    assert ended == free[: free.index(free[5])]


@pytest.mark.parametrize(
    ("options", "kept"),
    [({}, 4), ({"top_k": 2}, 2), ({"top_p": 0.7}, 2), ({"top_p": 0.4}, 1), ({"top_k": 1}, 1)],
)
def test_draws_follow_the_probabilities_of_what_is_kept(options, kept):
    probabilities = torch.tensor([0.1, 0.5, 0.15, 0.25])
    settings = {"temperature": 1.0, "top_k": None, "top_p": None} | options
    generator = torch.Generator().manual_seed(0)
    draws = Counter(
        _choose(probabilities.log(), *settings.values(), generator) for _ in range(4000)
    )
    order = probabilities.argsort(descending=True)[:kept]
    expected = probabilities[order] / probabilities[order].sum()
    assert set(draws) == set(order.tolist())
    for token, share in zip(order.tolist(), expected.tolist(), strict=True):
        assert draws[token] / 4000 == pytest.approx(share, abs=0.03)


def test_temperature_sharpens_as_the_softmax_says():
    logits, generator = torch.tensor([0.0, 1.0]), torch.Generator().manual_seed(0)
    draws = [_choose(logits, 0.5, None, None, generator) for _ in range(4000)]
    assert sum(draws) / 4000 == pytest.approx(torch.sigmoid(torch.tensor(2.0)).item(), abs=0.03)


def test_samples_leave_mode_and_random_state_alone(prepared):
    tokenizer = load_tokenizer(prepared / "tokenizer")
    shape = {**vars(CONFIG), "vocabulary_size": tokenizer.vocabulary_size, "dropout": 0.5}
    model = GPT2(GPT2Config(**shape)).initialize(0).train()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    options = {"per_prompt": 2, "new_tokens": 5, "context_length": 24}
    first = sample_texts(model, tokenizer, ["def", "x ="], seed=1, **options)
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    assert [s["prompt"] for s in first] == ["def", "def", "x =", "x ="]
    assert first == sample_texts(model, tokenizer, ["def", "x ="], seed=1, **options)
    assert first != sample_texts(model, tokenizer, ["def", "x ="], seed=2, **options)
