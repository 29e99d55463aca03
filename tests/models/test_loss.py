"""The fused loss equals torch's cross-entropy in float64, values and gradients."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from pretrain_lib.data.windows.packing import IGNORED_TARGET
from pretrain_lib.models import loss as loss_module
from pretrain_lib.models.loss import linear_cross_entropy
from pretrain_lib.models.transformers_head import chunked_loss


def random_problem(rows, width, vocabulary, padding, ignored, seed, dtype=torch.float64):
    """Return hidden (N, D), weight (V + padding, D), targets (N); padding rows are not zero."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary + padding, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < ignored] = IGNORED_TARGET
    return (
        hidden.to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(),
        targets,
    )


def reference(hidden, weight, targets, vocabulary_size, factor=1.0, z_loss=0.0):
    """Return torch's float64 loss, and the gradients of `factor` times it with the z-loss."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = hidden @ weight[:vocabulary_size].T
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORED_TARGET, reduction="sum")
    counted = logits[targets != IGNORED_TARGET]
    minimized = loss + z_loss * counted.logsumexp(dim=1).square().sum()
    return loss.detach(), *torch.autograd.grad(factor * minimized, (hidden, weight))


def relative_error(value, expected):
    return float((value.double() - expected).norm() / expected.norm())


@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 12),
    vocabulary=st.integers(1, 40),
    padding=st.integers(0, 9),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    chunk_logits=st.integers(1, 2000),
    block_logits=st.integers(1, 200),
    z_loss=st.sampled_from([0.0, 1e-4, 0.5]),
    factor=st.sampled_from([1.0, -2.5, 1 / 3]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=80, deadline=None)
def test_loss_and_gradients_equal_torch_in_float64(
    rows, width, vocabulary, padding, ignored, chunk_logits, block_logits, z_loss, factor, seed
):
    hidden, weight, targets = random_problem(rows, width, vocabulary, padding, ignored, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(loss_module.CHUNK_BYTES, "cpu", 8 * chunk_logits)
        patch.setattr(loss_module, "BLOCK_LOGITS", block_logits)
        loss, count = linear_cross_entropy(
            hidden, weight, targets, vocabulary_size=vocabulary, z_loss=z_loss
        )
    (factor * loss).backward()
    expected, hidden_grad, weight_grad = reference(
        hidden, weight, targets, vocabulary, factor, z_loss
    )
    assert loss.dtype == torch.float32 and loss.shape == count.shape == ()
    assert int(count) == sum(int(target) != IGNORED_TARGET for target in targets)
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-6, atol=1e-7)
    # The upstream factor passes through the fp32 loss, hence 1e-7 and not float64's own.
    torch.testing.assert_close(hidden.grad, hidden_grad, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(weight.grad, weight_grad, rtol=1e-7, atol=1e-12)
    assert not weight.grad[vocabulary:].any()  # exactly zero


@pytest.mark.parametrize("rows", [0, 9])
def test_no_target_gives_zero_loss_and_zero_gradients(rows):
    hidden, weight, targets = random_problem(rows, 4, 11, 5, 1.0, 0)
    loss, count = linear_cross_entropy(hidden, weight, targets, vocabulary_size=11)
    loss.backward()
    assert loss.item() == 0.0 and count.item() == 0
    assert not hidden.grad.any() and not weight.grad.any()


def test_leading_shape_of_hidden_and_targets_does_not_matter():
    hidden, weight, targets = random_problem(12, 5, 17, 0, 0.2, 1)
    flat, _ = linear_cross_entropy(hidden, weight, targets)
    batched, count = linear_cross_entropy(
        hidden.reshape(3, 4, 5), weight, targets.reshape(3, 4), vocabulary_size=17
    )
    expected, *_ = reference(hidden, weight, targets, 17)
    assert flat.item() == batched.item() == pytest.approx(expected.item(), rel=1e-6)
    assert count.item() == (targets != IGNORED_TARGET).sum().item()


@pytest.mark.parametrize("chunk_logits", [1, 3000, 2**26])
def test_fp32_is_within_1e_6_of_float64(monkeypatch, chunk_logits):
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", 4 * chunk_logits)
    hidden, weight, targets = random_problem(64, 32, 1000, 24, 0.1, 2, torch.float32)
    loss, _ = linear_cross_entropy(hidden, weight, targets, vocabulary_size=1000)
    loss.backward()
    expected, hidden_grad, weight_grad = reference(hidden, weight, targets, 1000)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert relative_error(hidden.grad, hidden_grad) < 1e-6
    assert relative_error(weight.grad, weight_grad) < 1e-6


@pytest.mark.parametrize("chunk_logits", [1024 * 16, 2**26])
def test_bf16_autocast_is_within_one_per_cent_of_float64(monkeypatch, chunk_logits):
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", 4 * chunk_logits)
    hidden, weight, targets = random_problem(64, 32, 1000, 24, 0.1, 3, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = linear_cross_entropy(hidden, weight, targets, vocabulary_size=1000)
    loss.backward()
    expected, hidden_grad, weight_grad = reference(hidden, weight, targets, 1000)
    assert loss.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=2e-3)
    assert relative_error(hidden.grad, hidden_grad) < 1e-2
    assert relative_error(weight.grad, weight_grad) < 1e-2
    assert not weight.grad[1000:].any()


def test_over_chunks_bf16_is_summed_in_fp32(monkeypatch):
    def gradient(chunk_rows):
        monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", chunk_rows * 2 * 1024)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, _ = linear_cross_entropy(hidden, weight, targets, vocabulary_size=1000)
        return loss.item(), torch.autograd.grad(loss, weight)[0]

    hidden, weight, targets = random_problem(256, 32, 1000, 24, 0.1, 3, torch.float32)
    loss, weight_grad = gradient(1)
    low = hidden.detach().bfloat16(), weight.detach().bfloat16()
    logits = torch.cat([row @ low[1].T for row in low[0].split(1)])[:, :1000]
    expected = F.cross_entropy(logits.double(), targets, reduction="sum")
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    _, of_one_product = gradient(256)
    assert relative_error(weight_grad, of_one_product.double()) < 3e-3


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any floating tensor made by an operation has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for leaf in tree_iter(output):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                self.elements = max(self.elements, leaf.numel())
        return output


# What rounding a number once changes at most, relative to it.
ROUNDING = {torch.float32: 2**-23, torch.bfloat16: 2**-8}


@pytest.mark.parametrize("targets", [393_728, 520_000, 522_000, 2**19])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_the_weight_of_a_target_is_not_rounded_to_bf16(targets, weight_dtype):
    torch.manual_seed(0)
    hidden = torch.randn(256, 128, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(64, 128, dtype=weight_dtype, requires_grad=True)
    loss, _ = linear_cross_entropy(hidden, weight, torch.randint(64, (256,)))
    of_sum = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    of_mean = torch.autograd.grad(loss * (8 / targets), (hidden, weight))
    for whole, scaled in zip(of_sum, of_mean, strict=True):
        expected = whole.double() * (8 / targets)
        error = (scaled.double() - expected).abs()
        assert (error <= 1.0001 * ROUNDING[whole.dtype] * expected.abs()).all()


@pytest.mark.parametrize("rows", [95, 96])
def test_no_tensor_larger_than_a_chunk_is_made(monkeypatch, rows):
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", 4 * 8 * 200)
    hidden, weight, targets = random_problem(rows, 4, 200, 0, 0.1, 4, torch.float32)
    with LargestTensor() as plain:
        F.cross_entropy(hidden @ weight.T, targets, reduction="sum").backward()
    assert plain.elements == rows * 200  # the measure sees the logits of a plain head
    with LargestTensor() as fused:
        linear_cross_entropy(hidden, weight, targets)[0].backward()
    assert fused.elements == 8 * 200


def test_only_the_two_gradients_are_saved_for_backward(monkeypatch):
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", 4 * 8 * 200)
    hidden, weight, targets = random_problem(96, 4, 200, 0, 0.1, 5, torch.float32)
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: shapes.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor
    ):
        linear_cross_entropy(hidden, weight, targets)
    assert sorted(shapes) == [(96, 4), (200, 4)]


@pytest.mark.parametrize("autocast", [False, True])
def test_loss_without_gradients_is_the_same(autocast):
    hidden, weight, targets = random_problem(30, 8, 50, 14, 0.2, 6, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        with_gradients, count = linear_cross_entropy(hidden, weight, targets, vocabulary_size=50)
        with torch.no_grad():
            without, same_count = linear_cross_entropy(hidden, weight, targets, vocabulary_size=50)
    assert with_gradients.requires_grad and not without.requires_grad
    assert with_gradients.item() == without.item() and count == same_count


def test_without_gradients_only_the_logits_are_multiplied():
    hidden, weight, targets = random_problem(30, 8, 50, 14, 0.2, 6, torch.float32)
    product = 2 * 30 * 8 * 64  # operations
    for context, products in ((torch.enable_grad(), 3), (torch.no_grad(), 1)):
        with context, FlopCounterMode(display=False) as counter:
            linear_cross_entropy(hidden, weight, targets, vocabulary_size=50)
        assert counter.get_total_flops() == products * product


@pytest.mark.parametrize("trained", [0, 1])
def test_of_hidden_and_weight_one_may_be_frozen(trained):
    *tensors, targets = random_problem(10, 4, 13, 3, 0.2, 7)
    _, *gradients = reference(*tensors, targets, 13)
    tensors[1 - trained].requires_grad_(False)
    loss, _ = linear_cross_entropy(*tensors, targets, vocabulary_size=13)
    loss.backward()
    torch.testing.assert_close(tensors[trained].grad, gradients[trained], rtol=1e-7, atol=1e-12)


@given(magnitude=st.sampled_from([1e2, 1e4, 1e6, 1e12]), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_extreme_logits_stay_finite_and_right(magnitude, seed):
    hidden, weight, targets = random_problem(20, 6, 30, 2, 0.0, seed, torch.float32)
    hidden = (hidden.detach() * magnitude).requires_grad_()
    loss, _ = linear_cross_entropy(hidden, weight, targets, vocabulary_size=30)
    loss.backward()
    expected, *_ = reference(hidden, weight, targets, 30)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_logits_near_the_limits_of_fp32_are_exact():
    hidden = torch.tensor([[1.0], [1.0]], requires_grad=True)
    weight = torch.tensor([[1e30], [-1e30], [0.0], [3e38]], requires_grad=True)
    loss, _ = linear_cross_entropy(hidden, weight, torch.tensor([0, 2]), vocabulary_size=3)
    loss.backward()
    assert loss.item() == pytest.approx(1e30)  # 0 for the largest logit, 1e30 for the one below
    assert weight.grad.tolist() == [[1.0], [0.0], [-1.0], [0.0]]


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
def test_the_compiled_form_is_the_same_function(autocast):
    results = []
    for compiled in (False, True):
        hidden, weight, targets = random_problem(48, 16, 300, 20, 0.2, 8, torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            options = {"vocabulary_size": 300, "z_loss": 1e-3, "compiled": compiled}
            loss, _ = linear_cross_entropy(hidden, weight, targets, **options)
        loss.backward()
        results.append((loss.detach(), hidden.grad, weight.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-5, atol=1e-3 if autocast else 1e-5)


HEADS = ["matrix", "other"]


def loss_of(head, hidden, weight, targets, z_loss=0.0):
    """Return the loss by the fused head, or by one that makes its own logits."""
    if head == "matrix":
        return linear_cross_entropy(hidden, weight, targets, z_loss=z_loss)
    own = SimpleNamespace(logits=lambda x: x @ weight.T)
    return chunked_loss(own, hidden, targets, vocabulary_size=len(weight), z_loss=z_loss)


@pytest.mark.parametrize("head", HEADS)
def test_the_z_loss_is_in_the_gradients_and_not_in_the_loss(head):
    hidden, weight, targets = random_problem(16, 4, 50, 0, 0.2, 1, torch.float32)
    plain, _ = loss_of(head, hidden, weight, targets)
    loss, _ = loss_of(head, hidden, weight, targets, z_loss=0.1)
    assert torch.equal(loss, plain)
    loss.backward()
    expected, *gradients = reference(hidden, weight, targets, 50, z_loss=0.1)
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-6, atol=0)
    for found, gradient in zip((hidden.grad, weight.grad), gradients, strict=True):
        assert relative_error(found, gradient) < 1e-5


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("shape", [(2, 9), (1,), (16,), (8, 2), (2, 8, 1), ()])
def test_targets_of_another_shape_are_refused(head, shape):
    hidden, weight, _ = random_problem(16, 4, 50, 0, 0.0, 1)
    targets = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"targets of shape .* must have the shape \(2, 8\)"):
        loss_of(head, hidden.view(2, 8, 4), weight, targets)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("wrong", [-1, -99, -101, 50, 2**40])
def test_targets_that_are_no_ids_are_refused(head, wrong):
    hidden, weight, targets = random_problem(16, 4, 50, 0, 0.3, 1)
    targets[5] = wrong
    with pytest.raises(ValueError, match=rf"^targets hold {wrong}: .* 0 to 49, or -100"):
        loss_of(head, hidden, weight, targets)


def test_a_target_in_the_padding_of_the_vocabulary_is_refused():
    hidden, weight, targets = random_problem(16, 4, 50, 14, 0.3, 1)
    targets[5] = 50
    with pytest.raises(ValueError, match="targets hold 50"):
        linear_cross_entropy(hidden, weight, targets, vocabulary_size=50)


@pytest.mark.parametrize("head", HEADS)
def test_where_raising_would_be_waiting_wrong_targets_make_loss_and_gradients_nan(
    head, monkeypatch
):
    def results(targets):
        loss, count = loss_of(head, hidden, weight, targets)
        return loss.detach(), count, *torch.autograd.grad(loss, (hidden, weight))

    hidden, weight, targets = random_problem(16, 4, 50, 0, 0.3, 1, torch.float32)
    expected = results(targets)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # as on a GPU
    for value, same in zip(results(targets), expected, strict=True):
        assert torch.equal(value, same) and value.dtype == same.dtype
    for wrong in (-1, 50, 2**40):
        targets[5] = wrong
        loss, _, *gradients = results(targets)
        assert loss.isnan() and all(gradient.isnan().all() for gradient in gradients)
