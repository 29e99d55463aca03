"""Tokens read in pieces through the cache, in rows of different length, against transformers."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from pretrain_lib import GPT2, KeyValueCache, Llama, save_pretrained
from tests.models.test_models import SMALL

FAMILIES = {"gpt2": SMALL["gpt2"], "llama": SMALL["llama"]}  # the second groups its queries
CONTEXT = 24
TOLERANCE = 2e-4  # of logits up to 20: LLaMA turns and normalises in float32 in transformers


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """A model of ours in float64, and what transformers makes of it."""
    config = FAMILIES[request.param]
    model = (GPT2 if request.param == "gpt2" else Llama)(config).initialize(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)  # so that attention looks at some tokens more than at others
    folder = tmp_path_factory.mktemp(request.param)
    save_pretrained(model, folder, tokenizer=None)
    return model.double().eval(), AutoModelForCausalLM.from_pretrained(folder).double().eval()


def random_ids(*shape, seed=0):
    return torch.randint(67, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def read_in_pieces(model, rows, pieces, *, slots=CONTEXT):
    """Return the logits of each row of ids, read in pieces of so many tokens per row."""
    cache = KeyValueCache(model.config, rows=len(rows), slots=slots)
    found = [[] for _ in rows]
    for counts in pieces:
        starts = cache.lengths.tolist()
        padded = torch.full((len(rows), max(counts)), 66)
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            padded[row, :count] = rows[row][start : start + count]
        logits = model(padded, cache=cache)
        cache.advance(torch.tensor(counts))
        for row, count in enumerate(counts):
            found[row].append(logits[row, :count])
    return [torch.cat(parts) for parts in found]


def differences(pair, rows, pieces, **options):
    """Return how far each row's logits are from those of transformers on that row alone."""
    model, other = pair
    found = read_in_pieces(model, rows, pieces, **options)
    with torch.no_grad():
        expected = [
            other(row[None, : len(logits)]).logits[0]
            for row, logits in zip(rows, found, strict=True)
        ]
    return [float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)]


PIECES = [
    [[9, 5, 1]],
    [[9, 5, 1], [1, 1, 1], [1, 1, 1]],
    [[3, 9, 5], [4, 1, 2], [1, 6, 3]],
    [[2, 5, 1], [0, 4, 3], [5, 0, 1]],  # a row may have nothing new
]


@pytest.mark.parametrize("pieces", PIECES)
def test_rows_read_in_pieces_have_the_logits_of_each_alone(pair, pieces):
    assert max(differences(pair, random_ids(3, CONTEXT), pieces)) < TOLERANCE


@pytest.mark.parametrize("fault", ["padded positions", "other rows' slots"])
def test_positions_that_ignore_the_pads_would_be_seen(pair, fault, monkeypatch):
    """The test above finds a planted fault: positions or slots counted from the longest row."""
    right = KeyValueCache.begin

    def begin(self, rows, length, device):
        own = self.lengths
        if fault == "other rows' slots":
            self.lengths = own.max().expand(len(own)).clone()
        positions, layers = right(self, rows, length, device)
        self.lengths = own
        if fault == "padded positions":
            positions = int(own.max()) + torch.arange(length).expand(len(own), length)
        return positions, layers

    monkeypatch.setattr(KeyValueCache, "begin", begin)
    found = differences(pair, random_ids(3, CONTEXT), [[9, 5, 1], [2, 2, 2]])
    assert found[0] < TOLERANCE < 100 * TOLERANCE < min(found[1:])


def test_pads_may_reach_beyond_the_context(pair):
    pieces = [[22, 3], [2, 12]]  # the first row's pads would stand at 24 to 33
    assert max(differences(pair, random_ids(2, CONTEXT), pieces, slots=CONTEXT + 12)) < TOLERANCE


@torch.no_grad()
def test_copies_of_rows_go_on_by_themselves(pair):
    model, other = pair
    contexts, endings = random_ids(2, 7), random_ids(4, 5, seed=1)
    cache = KeyValueCache(model.config, rows=2, slots=7)
    model(contexts, cache=cache)
    cache.advance(torch.tensor([7, 4]))
    rows = torch.tensor([1, 0, 0, 1])
    for _ in range(2):  # the second finds the cache as the first did
        copy = cache.expand(rows, slots=12)
        found = model(endings, cache=copy)
        assert cache.lengths.tolist() == [7, 4]
        for row, logits, ending in zip(rows.tolist(), found, endings, strict=True):
            length = (7, 4)[row]
            whole = torch.cat([contexts[row, :length], ending])[None]
            expected = other(whole).logits[0, length:]
            torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_a_cache_holds_keys_in_the_dtype_they_come_in(pair):
    model, _ = pair
    ids = random_ids(1, 8)
    cache = KeyValueCache(model.config, rows=1, slots=8)
    with torch.autocast("cpu", torch.bfloat16):
        single = model.float()(ids, cache=cache)
        plain = model(ids)
    model.double()
    assert {kept.dtype for pair in cache.layers for kept in pair} == {torch.bfloat16}
    torch.testing.assert_close(single.float(), plain.float(), rtol=0.1, atol=0.5)


def test_a_row_that_outgrows_the_context_is_refused(pair):
    cache = KeyValueCache(pair[0].config, rows=2, slots=30)
    cache.advance(torch.tensor([20, 3]))
    cache.advance(4)
    with pytest.raises(ValueError, match="25 tokens .*model.context_length=24"):
        cache.advance(1)


def test_the_loss_after_a_context_is_that_of_the_whole(pair):
    model, _ = pair
    ids = random_ids(2, 12)
    cache = KeyValueCache(model.config, rows=2, slots=12)
    targets = ids.roll(-1, 1)
    whole = targets.clone()
    whole[:, :8] = -100
    with torch.no_grad():
        expected = model(ids, whole)
        model.hidden_states(ids[:, :8], cache=cache)
        cache.advance(8)
        found = model(ids[:, 8:], targets[:, 8:], cache=cache)
    assert found[1] == expected[1] == 8
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-6)


def test_attention_has_as_many_keys_as_there_are_heads_for_them(pair):
    config = replace(pair[0].config, num_layers=1)
    model = (GPT2 if hasattr(config, "dropout") else Llama)(config).initialize(0)
    cache = KeyValueCache(config, rows=3, slots=10)
    with torch.no_grad():
        model(random_ids(3, 6), cache=cache)
    ((keys, values),) = cache.layers
    heads = getattr(config, "num_key_value_heads", 4)
    assert keys.shape == values.shape == (3, heads, 10, 8)
    assert keys[:, :, :6].any() and not keys[:, :, 6:].any()
