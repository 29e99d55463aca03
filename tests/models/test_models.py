"""Sizes, initialisation, padding and refusals of the two models."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from pretrain_lib.models.gpt2 import GPT2, GPT2Config
from pretrain_lib.models.llama import Llama, LlamaConfig
from pretrain_lib.optim.groups import build_adamw

SHAPE = {"vocabulary_size": 67, "context_length": 24, "num_layers": 2, "num_heads": 4, "width": 32}
LLAMA_SHAPE = SHAPE | {"num_key_value_heads": 2, "mlp_width": 48}
SMALL = {
    "gpt2": GPT2Config(**SHAPE),
    "llama": LlamaConfig(**LLAMA_SHAPE),
    "tied llama": LlamaConfig(**LLAMA_SHAPE, tied_head=True),
    "qwen3": LlamaConfig(**LLAMA_SHAPE, head_width=12, qk_norm=True),
}
TABLES = ("wte.weight", "embed_tokens.weight", "lm_head.weight")


def build(config):
    return GPT2(config) if isinstance(config, GPT2Config) else Llama(config)


def tables(model):
    return [p for name, p in model.named_parameters() if name.endswith(TABLES)]


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (GPT2Config(vocabulary_multiple=1), 124_439_808),
        (GPT2Config(), 124_475_904),
        (LlamaConfig(), 1_266_780_160),
        (LlamaConfig(tied_head=True), 1_250_002_944),
    ],
)
def test_recipes_have_the_published_number_of_parameters(config, parameters):
    with torch.device("meta"):
        model = build(config)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name", SMALL)
def test_initial_weights_have_the_spread_of_their_kind(name):
    config = replace(SMALL[name], width=128, num_layers=8, context_length=256, vocabulary_size=500)
    model = build(config).initialize(0)
    seen = set()
    for parameter_name, parameter in model.named_parameters():
        kind = parameter_name.rsplit(".", 2)[-2:]
        seen.add(kind[0])
        values = parameter.detach()
        if kind[0] in ("c_proj", "o_proj", "down_proj") and kind[1] == "weight":
            expected = 0.02 / math.sqrt(2 * 8)
        elif values.dim() == 2:
            expected = 0.02
        elif kind[1] == "bias":
            assert (values == 0).all()
            continue
        else:
            assert (values == 1).all()
            continue
        if parameter_name.endswith(TABLES):
            values = values[:500]
        # Six standard errors of the sample's own spread and mean.
        error = 6 * expected / math.sqrt(values.numel())
        assert abs(values.std().item() - expected) < error
        assert abs(values.mean().item()) < error
    residual = {"c_proj"} if name == "gpt2" else {"o_proj", "down_proj"}
    assert residual <= seen


@pytest.mark.parametrize("name", SMALL)
def test_padding_rows_are_zero_after_initialisation(name):
    model = build(SMALL[name]).initialize(0)
    for table in tables(model):
        assert table.shape == (128, 32)
        assert not table[67:].any() and table[:67].all()


@pytest.mark.parametrize("name", SMALL)
def test_initialisation_is_a_function_of_the_seed(name):
    torch.manual_seed(1)
    first = build(SMALL[name]).initialize(5).state_dict()
    torch.manual_seed(2)  # the global generator has no part in it
    again = build(SMALL[name]).initialize(5).state_dict()
    other = build(SMALL[name]).initialize(6).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first if first[key].dim() == 2)


@pytest.mark.parametrize("name", SMALL)
def test_loss_at_initialisation_is_near_that_of_a_uniform_guess(name):
    model = build(SMALL[name]).initialize(0)
    ids = torch.randint(67, (8, 25), generator=torch.Generator().manual_seed(0))
    loss, count = model(ids[:, :-1], ids[:, 1:])
    assert count.item() == 8 * 24
    assert (loss / count).item() == pytest.approx(math.log(67), abs=0.05)


@pytest.mark.parametrize("name", SMALL)
def test_loss_is_the_cross_entropy_of_the_logits(name):
    model = build(SMALL[name]).initialize(0)
    ids = torch.randint(67, (3, 20), generator=torch.Generator().manual_seed(1))
    targets = ids.roll(-1, 1)
    targets[:, ::3] = -100
    loss, count = model(ids, targets)
    logits = model(ids)
    assert logits.shape == (3, 20, 67)
    expected = torch.nn.functional.cross_entropy(
        logits.double().flatten(0, 1), targets.flatten(), reduction="sum"
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert count.item() == (targets != -100).sum().item()


@pytest.mark.parametrize("name", SMALL)
def test_a_sequence_longer_than_the_context_is_refused(name):
    model = build(SMALL[name]).initialize(0)
    assert model(torch.zeros(1, 24, dtype=torch.int64)).shape[1] == 24
    with pytest.raises(ValueError, match="25 tokens .*model.context_length=24"):
        model(torch.zeros(1, 25, dtype=torch.int64))


def test_head_numbers_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="model.width=32 .*model.num_heads=5"):
        GPT2Config(**SHAPE | {"num_heads": 5})
    with pytest.raises(ValueError, match="model.width=32 .*model.num_heads=5"):
        LlamaConfig(**LLAMA_SHAPE | {"num_heads": 5})
    with pytest.raises(ValueError, match="model.num_heads=4 .*model.num_key_value_heads=3"):
        LlamaConfig(**LLAMA_SHAPE | {"num_key_value_heads": 3})
    with pytest.raises(ValueError, match="head's width is even"):
        LlamaConfig(**LLAMA_SHAPE | {"width": 4})


@pytest.mark.parametrize("name", SMALL)
def test_padding_stays_zero_and_without_effect_over_five_steps(name):
    """The same weights with and without padding rows train to the same model."""
    padded = build(SMALL[name]).initialize(0)
    plain = build(replace(SMALL[name], vocabulary_multiple=1))
    with torch.no_grad():
        for own, other in zip(plain.parameters(), padded.parameters(), strict=True):
            own.copy_(other[: len(own)])
    optimizers = [build_adamw(model, learning_rate=1e-2) for model in (padded, plain)]
    generator = torch.Generator().manual_seed(2)
    before = plain(torch.zeros(1, 1, dtype=torch.int64)).detach()
    for _ in range(5):
        ids = torch.randint(67, (4, 25), generator=generator)
        losses = []
        for model, optimizer in zip((padded, plain), optimizers, strict=True):
            loss, count = model(ids[:, :-1], ids[:, 1:])
            (loss / count).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert all(not table[67:].any() for table in tables(padded))
        with torch.no_grad():
            logits = [model.eval()(ids[:, :-1]) for model in (padded, plain)]
        assert logits[0].shape == logits[1].shape == (4, 24, 67)
        # Adam divides tiny gradients by their own size, which enlarges rounding differences.
        torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-3)
    assert (plain(torch.zeros(1, 1, dtype=torch.int64)) - before).abs().max() > 0.1


def test_dropout_acts_in_training_only():
    model = GPT2(replace(SMALL["gpt2"], dropout=0.5)).initialize(0)
    ids = torch.randint(67, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.manual_seed(0)
        assert not torch.equal(model.train()(ids), model(ids))
        still = GPT2(SMALL["gpt2"])
        still.load_state_dict(model.state_dict())
        assert torch.equal(model.eval()(ids), still(ids))


@pytest.mark.parametrize("name", SMALL)
def test_a_head_of_ones_own_trains_with_any_optimizer(name):
    model, head = build(SMALL[name]).initialize(0), nn.Linear(32, 3)
    ids = torch.tensor([[5, 8, 5, 1]])
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=0.1)
    before = tables(model)[0].detach().clone()
    head(model.hidden_states(ids)).square().sum().backward()
    optimizer.step()
    moved = (tables(model)[0] - before).abs().amax(dim=1).nonzero().flatten()
    assert moved.tolist() == [1, 5, 8]


def test_the_gradient_of_a_tied_table_is_the_sum_of_both_uses():
    model = build(SMALL["gpt2"]).initialize(0)
    ids = torch.randint(67, (2, 9), generator=torch.Generator().manual_seed(0))
    model(ids[:, :-1], ids[:, 1:])[0].backward()  # sparse, and added to the head's
    found, table = model.head_weight.grad.clone(), model.head_weight
    model.zero_grad()
    logits = nn.functional.linear(model.hidden_states(ids[:, :-1]), table[:67])
    targets = ids[:, 1:].flatten()
    nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum").backward()
    torch.testing.assert_close(found, table.grad)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("wrong", [-1, 67, 127, 128, 2**40])  # 67 ids, a table of 128 rows
def test_an_id_that_the_vocabulary_lacks_is_refused_on_a_cpu(name, wrong):
    model, ids = build(SMALL[name]), torch.zeros(2, 8, dtype=torch.int64)
    assert SMALL[name].padded_vocabulary_size == 128
    ids[1, 3] = wrong
    with pytest.raises(ValueError, match=rf"^input_ids hold {wrong}: .* has 67 tokens"):
        model(ids)


@pytest.mark.parametrize("name", SMALL)
def test_a_model_has_initial_weights_as_soon_as_it_is_built(name):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        built = build(SMALL[name])
    for own, same in zip(
        built.parameters(), build(SMALL[name]).initialize(7).parameters(), strict=True
    ):
        assert torch.equal(own, same)
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in build(SMALL[name]).parameters())
