"""AdamW's decay groups, and its step against the formula in float64."""

import re

import pytest
import torch
from torch import nn

from pretrain_lib import OptimizerConfig, Recipe
from pretrain_lib.models.gpt2 import GPT2, GPT2Config
from pretrain_lib.models.llama import Llama, LlamaConfig
from pretrain_lib.optim.groups import build_adamw, build_muon
from pretrain_lib.optim.parameters import parameter_groups

SMALL_GPT2 = GPT2Config(vocabulary_size=31, context_length=8, num_layers=2, num_heads=2, width=8)
SMALL_LLAMA = LlamaConfig(
    vocabulary_size=31,
    context_length=8,
    num_layers=2,
    num_heads=2,
    num_key_value_heads=1,
    width=8,
    mlp_width=16,
)


def test_gpt2_124m_decays_50_tensors_and_spares_98():
    with torch.device("meta"):
        model = GPT2(GPT2Config())
    decayed, spared = parameter_groups(model, weight_decay=0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert (len(decayed["params"]), len(spared["params"])) == (50, 98)


@pytest.mark.parametrize("build", [lambda: GPT2(SMALL_GPT2), lambda: Llama(SMALL_LLAMA)])
def test_every_trainable_parameter_is_in_exactly_one_group(build):
    model = build()
    groups = parameter_groups(model, weight_decay=0.3)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted({id(p) for p in model.parameters()})
    spared = {id(p) for p in groups[1]["params"]}
    for name, parameter in model.named_parameters():
        is_norm_or_bias = "ln_" in name or "norm" in name or name.endswith("bias")
        assert (id(parameter) in spared) == is_norm_or_bias


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    grouped = [p for g in parameter_groups(model, weight_decay=0.1) for p in g["params"]]
    assert [id(p) for p in grouped] == [id(model[1].weight), id(model[1].bias)]


DEFAULTS = {"betas": (0.9, 0.95), "epsilon": 1e-8, "weight_decay": 0.1}
OTHERS = {"betas": (0.8, 0.9), "epsilon": 0.1, "weight_decay": 0.3}


@pytest.mark.parametrize("options", [{}, OTHERS])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_fused_steps_equal_adamw_by_hand_in_float64(dtype, tolerance, options):
    generator = torch.Generator().manual_seed(0)
    model = GPT2(SMALL_GPT2).initialize(0).to(dtype)
    optimizer = build_adamw(model, learning_rate=0.0, **options)
    (beta1, beta2), epsilon, weight_decay = (DEFAULTS | options).values()
    assert all(group["fused"] for group in optimizer.param_groups)
    hand = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    mean = {name: torch.zeros_like(p) for name, p in hand.items()}
    square = {name: torch.zeros_like(p) for name, p in hand.items()}
    for step in range(1, 9):
        learning_rate = 1e-2 / step  # set by hand before each step, as the training step does
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        for name, parameter in model.named_parameters():
            gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = gradient.to(dtype)
            gradient = parameter.grad.double()
            decay = weight_decay if parameter.dim() >= 2 else 0.0
            mean[name] = beta1 * mean[name] + (1 - beta1) * gradient
            square[name] = beta2 * square[name] + (1 - beta2) * gradient**2
            update = (mean[name] / (1 - beta1**step)) / (
                (square[name] / (1 - beta2**step)).sqrt() + epsilon
            )
            hand[name] = hand[name] - learning_rate * (decay * hand[name] + update)
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.detach().double(), hand[name], rtol=tolerance, atol=tolerance
        )


RATES = {"learning_rate": 1e-3, "matrix_learning_rate": 1e-5, "embedding_learning_rate": 1e-1}


def kind_of(name, parameter):
    if parameter.dim() < 2:
        return "learning_rate"
    embeds = name in ("transformer.wte.weight", "transformer.wpe.weight")
    return "embedding_learning_rate" if embeds else "matrix_learning_rate"


@pytest.mark.parametrize(("scale", "matrix_rate"), [(1.0, 1e-5), (0.5, 1e-5), (1.0, 0.0)])
def test_the_first_update_of_a_plain_loop_is_as_large_as_each_rate(scale, matrix_rate):
    rates = RATES | {"matrix_learning_rate": matrix_rate}
    model = GPT2(SMALL_GPT2).initialize(0).double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_adamw(model, **rates, weight_decay=0.0, epsilon=1e-30)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: scale)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()  # of a first gradient g, AdamW's update is rate * g / |g|
    for name, parameter in model.named_parameters():
        moved = (parameter.detach() - before[name]).abs()
        rate = scale * rates[kind_of(name, parameter)]
        torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=1e-9, atol=1e-15)


def test_the_groups_of_muon_begin_at_their_rates_too():
    model = GPT2(SMALL_GPT2)
    rates = {id(p): g["lr"] for g in build_muon(model, **RATES).param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == pytest.approx(RATES[kind_of(name, parameter)], rel=1e-12)


REFUSED = [
    ({"moments": "bfloat16"}, "moments=bfloat16 must be fp32 or bf16"),
    ({"moments": "fp16"}, "moments=fp16 must be fp32 or bf16; did you mean"),
    ({"moments": "bf16", "betas": (0.9, 0.999)}, "betas=[0.9, 0.999]: with moments=bf16 the"),
    ({"betas": (0.9, 1.0)}, "betas=(0.9, 1.0) must be two numbers of at least 0 and below 1"),
    ({"learning_rate": -1.0}, "learning_rate=-1.0 must be a number of at least 0"),
    ({"matrix_learning_rate": -1e-3}, "matrix_learning_rate=-0.001 must be a number of at least 0"),
    ({"weight_decay": float("nan")}, "weight_decay=nan must be a number of at least 0"),
]


@pytest.mark.parametrize("build", [build_adamw, build_muon])
@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_a_recipe_refuses_the_functions_refuse(build, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        build(GPT2(SMALL_GPT2), **{"learning_rate": 1e-3} | options)
    with pytest.raises(ValueError, match=rf"^optimizer\.{re.escape(message)}"):
        recipe = Recipe(optimizer=OptimizerConfig(**options), model=SMALL_GPT2)
        recipe.check(processes=1)


def test_a_momentum_that_never_decays_is_refused():
    with pytest.raises(ValueError, match="^momentum=1.0 must be a number of at least 0 and below"):
        build_muon(GPT2(SMALL_GPT2), learning_rate=1e-3, momentum=1.0)


@pytest.mark.parametrize("build", [build_adamw, build_muon])
@pytest.mark.parametrize("name", ["matrix_learning_rate", "embedding_learning_rate"])
def test_a_rate_of_its_own_beside_a_learning_rate_of_zero_is_refused(build, name):
    with pytest.raises(ValueError, match=f"^{name}=0.001: learning_rate must be above 0"):
        build(GPT2(SMALL_GPT2), learning_rate=0.0, **{name: 1e-3})
