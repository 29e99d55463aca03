"""Muon against its formula in float64: orthogonalization, updates, skipped updates, groups."""

import math

import pytest
import torch
from torch import nn

from pretrain_lib import (
    GPT2,
    GPT2Config,
    Llama,
    LlamaConfig,
    TrainingState,
    build_adamw,
    build_muon,
    load_checkpoint,
    save_checkpoint,
)
from pretrain_lib.optim.matrix_sharing import deal
from pretrain_lib.optim.muon import MOMENTUM
from pretrain_lib.optim.newton_schulz import newton_schulz_flops, orthogonalize
from pretrain_lib.optim.parameters import parameter_groups

SHAPE = {"vocabulary_size": 31, "context_length": 8, "num_layers": 2, "num_heads": 2, "width": 16}
SHAPE |= {"vocabulary_multiple": 1}  # random gradients would fill padding rows, which are not saved
MODELS = {
    "gpt2": lambda: GPT2(GPT2Config(**SHAPE)),
    "qwen3": lambda: Llama(
        LlamaConfig(**SHAPE, num_key_value_heads=1, mlp_width=24, qk_norm=True, tied_head=True)
    ),
}
RATES = {"learning_rate": 3e-3, "matrix_learning_rate": 5e-3, "embedding_learning_rate": 8e-3}


def set_gradients(model, step):
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in model.parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = drawn.to(parameter.dtype)


def newton_schulz(matrix):
    """Orthogonalize by the polynomial of the singular values, which needs no matrix products."""
    u, values, vt = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
    for _ in range(5):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    return u @ torch.diag(values) @ vt


class ByHand:
    """Muon and AdamW by their formulas, in float64."""

    def __init__(self, model, *, momentum=0.95, betas=(0.9, 0.95), epsilon=1e-8):
        self.momentum, self.betas, self.epsilon = momentum, betas, epsilon
        self.weights = {n: p.detach().double().clone() for n, p in model.named_parameters()}
        self.moments = {n: [torch.zeros_like(p)] * 2 for n, p in self.weights.items()}

    def step(self, model, number, factor=1.0):
        for name, parameter in model.named_parameters():
            gradient, old = parameter.grad.double(), self.weights[name]
            if parameter.dim() == 2 and (".h." in name or ".layers." in name):
                rate, update = 5e-3, self.muon_update(name, gradient)
            else:
                rate = (
                    8e-3 if name.endswith(("wte.weight", "wpe.weight", "tokens.weight")) else 3e-3
                )
                update = self.adamw_update(name, gradient, number)
            decay = 0.1 if parameter.dim() == 2 else 0.0
            self.weights[name] = old - factor * rate * (decay * old + update)

    def muon_update(self, name, gradient):
        share = self.momentum
        momentum = share * self.moments[name][0] + (1 - share) * gradient
        self.moments[name] = [momentum]
        direction = (1 - share) * gradient + share * momentum
        parts = direction.chunk(3) if name.endswith("c_attn.weight") else [direction]
        scale = 0.2 * math.sqrt(max(parts[0].shape))
        return torch.cat([scale * newton_schulz(part) for part in parts])

    def adamw_update(self, name, gradient, number):
        (first, second), (beta1, beta2) = self.moments[name], self.betas
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        self.moments[name] = [first, second]
        corrected = first / (1 - beta1**number), second / (1 - beta2**number)
        return corrected[0] / (corrected[1].sqrt() + self.epsilon)


OTHERS = {"momentum": 0.8, "betas": (0.8, 0.9), "epsilon": 0.1}


@pytest.mark.parametrize("options", [{}, OTHERS])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_20_steps_equal_the_formulas_in_float64(name, dtype, tolerance, options):
    model = MODELS[name]().initialize(0).to(dtype)
    optimizer = build_muon(model, **RATES, dtype=dtype, **options)
    hand = ByHand(model, **options)
    for step in range(20):
        set_gradients(model, step)
        hand.step(model, step + 1, factor=1 / (step + 1))
        for group in optimizer.param_groups:  # as the training step does
            group["lr"] = RATES["learning_rate"] / (step + 1) * group["lr_factor"]
        optimizer.step()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.detach().double(), hand.weights[key], rtol=0, atol=tolerance
        )


@pytest.mark.parametrize("dtype", ["bf16", torch.float16, torch.int32])
def test_a_dtype_that_does_not_orthogonalize_is_refused(dtype):
    with pytest.raises(ValueError, match=r"^dtype=.* must be torch.bfloat16, torch.float32 or"):
        build_muon(MODELS["gpt2"](), **RATES, dtype=dtype)


@pytest.mark.parametrize("shape", [(1, 5, 5), (3, 4, 9), (2, 9, 4), (2, 1, 7), (0, 3, 3)])
def test_orthogonalizing_changes_nothing_but_the_singular_values(shape):
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(shape, generator=generator, dtype=torch.float64)
    found = orthogonalize(matrices)
    for matrix, result in zip(matrices, found, strict=True):
        torch.testing.assert_close(result, newton_schulz(matrix), rtol=0, atol=1e-10)
    assert found.shape == shape
    assert torch.equal(orthogonalize(torch.zeros(shape)), torch.zeros(shape))


def test_in_bf16_the_directions_are_those_of_fp32():
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn((4, 24, 40), generator=generator)
    low = orthogonalize(matrices.bfloat16())
    assert low.dtype == torch.bfloat16
    exact = orthogonalize(matrices)
    similarity = nn.functional.cosine_similarity(low.float().flatten(1), exact.flatten(1))
    assert (similarity > 0.99).all()


def test_an_update_is_orthogonalized_in_the_dtype_that_is_asked_for():
    model = nn.Sequential(nn.Linear(40, 24, bias=False))
    model[0].weight.data.zero_()
    set_gradients(model, 0)
    direction = 0.05 * (1 + 0.95) * model[0].weight.grad  # Nesterov's, from no momentum
    build_muon(model, learning_rate=1.0, dtype=torch.bfloat16).step()
    expected = -0.2 * math.sqrt(40) * orthogonalize(direction[None].bfloat16())[0].float()
    exact = -0.2 * math.sqrt(40) * orthogonalize(direction[None])[0]
    found = model[0].weight.detach()
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    assert (found - expected).norm() < 0.1 * (found - exact).norm()


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_its_flops_are_those_that_torch_counts(shape):
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        orthogonalize(torch.randn(1, *shape))
    assert newton_schulz_flops(*shape) == counter.get_total_flops()


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_that_is_left_out_changes_no_bit(name, moments):
    model = MODELS[name]().initialize(0)
    optimizer = build_muon(model, **RATES, moments=moments)
    set_gradients(model, 0)
    optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    states = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in model.parameters()]
    optimizer.grad_scale, optimizer.found_inf = None, torch.ones(())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.step()
    for parameter, old, state in zip(model.parameters(), before, states, strict=True):
        assert torch.equal(parameter, old)
        assert all(torch.equal(optimizer.state[parameter][key], state[key]) for key in state)


def test_a_momentum_in_bf16_is_that_of_fp32_but_for_its_rounding():
    models = [MODELS["gpt2"]().initialize(0) for _ in range(2)]
    optimizers = [
        build_muon(model, **RATES, moments=moments)
        for model, moments in zip(models, ("fp32", "bf16"), strict=True)
    ]
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            set_gradients(model, step)
            optimizer.step()
    for exact, low in zip(*(model.parameters() for model in models), strict=True):
        kept = [o.state[p] for o, p in zip(optimizers, (exact, low), strict=True)]
        for name in kept[0].keys() - {"step"}:
            assert kept[1][name].dtype == torch.bfloat16
            torch.testing.assert_close(kept[0][name], kept[1][name].float(), rtol=2e-2, atol=1e-3)
        torch.testing.assert_close(exact, low, rtol=0, atol=1e-3)


def test_only_the_matrices_of_the_layers_are_muons():
    model = MODELS["qwen3"]()
    names = {id(p): name for name, p in model.named_parameters()}
    found = {
        (group["parts"], group["lr_factor"]): {names[id(p)].split(".")[-2] for p in group["params"]}
        for group in build_muon(model, **RATES).param_groups
    }
    projections = {f"{name}_proj" for name in ["q", "k", "v", "o", "gate", "up", "down"]}
    norms = {"input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "norm"}
    assert found == {
        (0, 8e-3 / 3e-3): {"embed_tokens"},
        (1, 5e-3 / 3e-3): projections,
        (0, 1.0): norms,
    }


def test_rows_are_dealt_as_torch_chunks_them():
    for number in range(12):
        for count in range(1, 9):
            chunks = [len(chunk) for chunk in torch.empty(number).chunk(count)]
            assert deal(number, count) == [*chunks, *[0] * (count - len(chunks))]


def test_layers_that_a_model_numbers_itself_are_muons():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 8), nn.LayerNorm(8))
    found = [p for g in build_muon(model, **RATES).param_groups if g["parts"] for p in g["params"]]
    assert [id(p) for p in found] == [id(model[1].weight), id(model[2].weight)]


def test_a_projection_of_another_shape_is_one_matrix_and_a_kernel_is_none():
    layer = nn.ModuleDict({"c_attn": nn.Linear(8, 12, bias=False), "conv": nn.Conv1d(3, 3, 2)})
    groups = parameter_groups(nn.ModuleList([layer]), weight_decay=0.1, matrix_factor=2, muon=True)
    found = [(g["parts"], g["lr_factor"], [p.dim() for p in g["params"]]) for g in groups]
    assert found == [(1, 2, [2]), (0, 1, [3]), (0, 1, [1])]


def test_a_model_of_which_muon_would_update_nothing_is_refused():
    model = nn.Module()
    model.attn, model.mlp = nn.Linear(4, 4), nn.Linear(4, 4)
    frozen = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    frozen[0].requires_grad_(False)
    for each in (model, frozen):
        with pytest.raises(ValueError, match="no matrix in a numbered layer .* nn.ModuleList"):
            build_muon(each, **RATES)


def test_an_untied_head_keeps_the_learning_rate():
    model = Llama(LlamaConfig(**SHAPE, num_key_value_heads=1, mlp_width=24))
    for build in (build_muon, build_adamw):
        rates = {
            name: group["lr_factor"]
            for group in build(model, **RATES).param_groups
            for name, parameter in model.named_parameters()
            if any(parameter is p for p in group["params"])
        }
        assert rates["lm_head.weight"] == rates["model.norm.weight"] == 1.0
        assert rates["model.embed_tokens.weight"] == 8e-3 / 3e-3
        assert rates["model.layers.1.mlp.up_proj.weight"] == 5e-3 / 3e-3


def test_a_rate_for_each_is_the_learning_rate_where_none_is_given():
    groups = parameter_groups(MODELS["gpt2"](), weight_decay=0.1)
    assert [(g["weight_decay"], g["lr_factor"], g["parts"]) for g in groups] == [
        (0.1, 1.0, 0),
        (0.0, 1.0, 0),
    ]


@pytest.mark.parametrize("kinds", [("adamw", "muon"), ("muon", "adamw")])
def test_a_checkpoint_of_the_other_optimizer_is_refused_by_name(tmp_path, kinds):
    build = {"adamw": build_adamw, "muon": build_muon}
    model = MODELS["gpt2"]().initialize(0)
    optimizers = [build[kind](model, **RATES) for kind in kinds]
    set_gradients(model, 0)
    optimizers[0].step()
    state = TrainingState(step=1)
    path = save_checkpoint(tmp_path, state, model, optimizers[0], tokenizer=None, manifest={})
    with pytest.raises(ValueError, match=rf"kind={kinds[0]} keeps.*kind={kinds[1]}.*initial_w"):
        load_checkpoint(path, model, optimizers[1])


def test_a_checkpoint_gives_back_every_bit(tmp_path):
    model = MODELS["gpt2"]().initialize(0)
    optimizer = build_muon(model, **RATES)
    set_gradients(model, 0)
    optimizer.step()
    state = TrainingState(step=1)
    path = save_checkpoint(tmp_path, state, model, optimizer, tokenizer=None, manifest={})
    again = MODELS["gpt2"]()
    resumed = build_muon(again, **RATES)
    load_checkpoint(path, again, resumed)
    for old, new in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(old, new)
        assert resumed.state[new].keys() == optimizer.state[old].keys()
        assert (MOMENTUM in resumed.state[new]) == (len(resumed.state[new]) == 1)
        for key, value in optimizer.state[old].items():
            assert torch.equal(resumed.state[new][key], value)


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_a_group_that_is_added_later_is_updated_by_adamw(moments):
    model, more = MODELS["gpt2"](), nn.Parameter(torch.ones(4, 3))
    optimizer = build_muon(model, learning_rate=1e-2, moments=moments)
    optimizer.add_param_group({"params": [more], "weight_decay": 0.0})
    more.grad = torch.full_like(more, 0.5)
    optimizer.step()
    assert set(optimizer.state[more]) == {"exp_avg", "exp_avg_sq", "step"}
    torch.testing.assert_close(more.detach(), torch.full_like(more, 1 - 1e-2))
