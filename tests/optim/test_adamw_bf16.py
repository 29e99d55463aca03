"""AdamW with moments in bf16 against torch's in fp32 and its formula."""

import pytest
import torch
from accelerate import Accelerator

from pretrain_lib import GPT2, GPT2Config, build_adamw, load_checkpoint, save_checkpoint
from pretrain_lib.checkpoint.state import TrainingState
from pretrain_lib.optim import adamw_bf16
from pretrain_lib.optim.adamw_bf16 import MOMENTS, AdamWBf16

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "fused": True}
SHAPE = GPT2Config(vocabulary_size=31, context_length=8, num_layers=1, num_heads=2, width=8)


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(37, 11), (5,)]
    ]


def set_gradients(tensors, step):
    generator = torch.Generator().manual_seed(100 + step)
    for tensor in tensors:
        tensor.grad = torch.randn(tensor.shape, generator=generator) + 0.5


@pytest.mark.parametrize(("chunk", "epsilon"), [(7, 1e-8), (2**18, 1e-8), (2**18, 0.1)])
def test_a_step_is_torchs_but_for_the_rounding_of_the_moments(monkeypatch, chunk, epsilon):
    monkeypatch.setitem(adamw_bf16.CHUNK, "cpu", chunk)
    ours, theirs = parameters(), parameters()
    options = OPTIONS | {"eps": epsilon}
    optimizers = AdamWBf16(ours, **options), torch.optim.AdamW(theirs, **options)
    for step in range(6):
        for tensors, optimizer in zip((ours, theirs), optimizers, strict=True):
            set_gradients(tensors, step)
            optimizer.step()
        for a, b in zip(ours, theirs, strict=True):
            states = [o.state[t] for o, t in zip(optimizers, (a, b), strict=True)]
            assert states[0]["step"] == states[1]["step"] == step + 1
            for moment in ("exp_avg", "exp_avg_sq"):
                assert states[0][moment].dtype == torch.bfloat16
                # The next step computes with what torch would have, were it rounded here.
                exact = states[1][moment]
                torch.testing.assert_close(states[0][moment], exact.bfloat16(), rtol=1e-2, atol=0)
                exact.copy_(states[0][moment])
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
            with torch.no_grad():
                b.copy_(a)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_updated_in_fp32_as_by_torch(dtype):
    ours, theirs = parameters(), parameters()
    for tensor in (*ours, *theirs):
        tensor.data = tensor.data.to(dtype)
    optimizers = AdamWBf16(ours, **OPTIONS), torch.optim.AdamW(theirs, **OPTIONS)
    for step in range(4):
        for tensors, optimizer in zip((ours, theirs), optimizers, strict=True):
            generator = torch.Generator().manual_seed(step)
            for tensor in tensors:
                tensor.grad = torch.randn(tensor.shape, generator=generator).to(dtype)
            optimizer.step()
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == dtype
            torch.testing.assert_close(a, b)
            with torch.no_grad():
                b.copy_(a)


def test_weights_and_gradients_of_any_strides_are_updated_alike():
    generator = torch.Generator().manual_seed(0)
    weight, gradient = (torch.randn(6, 4, generator=generator) for _ in range(2))
    results = []
    for weights_first, gradients_first in ((False, False), (True, False), (False, True)):
        own = weight.t().contiguous().t() if weights_first else weight.clone()
        tensor = torch.nn.Parameter(own)
        assert tensor.is_contiguous() is not weights_first
        tensor.grad = gradient.t().contiguous().t() if gradients_first else gradient.clone()
        optimizer = AdamWBf16([tensor], **OPTIONS)
        for _ in range(2):
            optimizer.step()
        results.append((tensor.detach(), *map(optimizer.state[tensor].get, MOMENTS)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_step_that_is_left_out_changes_nothing():
    tensors = parameters()
    optimizer = AdamWBf16(tensors, **OPTIONS)
    set_gradients(tensors, 0)
    optimizer.step()
    before = [tensor.detach().clone() for tensor in tensors]
    moments = [{k: v.clone() for k, v in optimizer.state[t].items()} for t in tensors]
    optimizer.grad_scale, optimizer.found_inf = None, torch.ones(())
    set_gradients(tensors, 1)
    optimizer.step()
    for tensor, old, state in zip(tensors, before, moments, strict=True):
        assert torch.equal(tensor, old)
        assert all(torch.equal(optimizer.state[tensor][key], state[key]) for key in state)


def saved_after_a_step(folder):
    """Return a model, its optimizer with moments in bf16, and a checkpoint of both."""
    model = GPT2(SHAPE).initialize(0)
    optimizer = build_adamw(model, learning_rate=1e-2, moments="bf16")
    set_gradients(list(model.parameters()), 0)
    optimizer.step()
    state = TrainingState(step=1)
    path = save_checkpoint(folder, state, model, optimizer, tokenizer=None, manifest={})
    return model, optimizer, path


def test_a_checkpoint_keeps_them_in_bf16_and_bit_for_bit(tmp_path):
    model, optimizer, path = saved_after_a_step(tmp_path)
    again = GPT2(SHAPE)
    resumed = build_adamw(again, learning_rate=1e-2, moments="bf16")
    load_checkpoint(path, again, resumed)
    for old, new in zip(model.parameters(), again.parameters(), strict=True):
        assert resumed.state[new]["exp_avg"].dtype == torch.bfloat16
        for key, value in optimizer.state[old].items():
            assert torch.equal(resumed.state[new][key], value)


def test_moments_change_their_dtype_on_loading(tmp_path):
    model, _, path = saved_after_a_step(tmp_path)
    resumed = build_adamw(model, learning_rate=1e-2)
    load_checkpoint(path, model, resumed)
    set_gradients(list(model.parameters()), 1)
    resumed.step()
    assert resumed.state[next(model.parameters())]["exp_avg"].dtype == torch.float32


def test_accelerate_leaves_the_moments_as_they_were():
    tensors = parameters()
    optimizer = AdamWBf16(tensors, **OPTIONS)
    set_gradients(tensors, 0)
    optimizer.step()
    before = [{k: v.clone() for k, v in optimizer.state[t].items()} for t in tensors]
    prepared = Accelerator(cpu=True).prepare(optimizer)  # which loads its own state again
    for tensor, state in zip(tensors, before, strict=True):
        for key, value in state.items():
            assert prepared.state[tensor][key].dtype == value.dtype
            assert torch.equal(prepared.state[tensor][key], value)
