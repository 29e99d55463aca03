"""On a GPU that is only pretended: no tensor of another device, and no wait for a number of it.

Fake tensors have shapes, dtypes and devices, but no numbers, so that whatever reads one on the host
raises. Nothing needs a GPU or a CUDA build of torch.
"""

import ctypes
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from pretrain_lib.models import document_attention
from pretrain_lib.models import loss as loss_module
from pretrain_lib.models.cache import TokenTrees
from pretrain_lib.models.gpt2 import GPT2, GPT2Config
from pretrain_lib.models.llama import Llama, LlamaConfig

CUDA = torch.device("cuda:0")
GUARDS = "_ZN3c104impl26device_guard_impl_registryE"  # c10::impl::device_guard_impl_registry
CUDA_TYPE, META_TYPE, NUM_DEVICE_TYPES = 1, 14, 21  # c10::DeviceType
SHAPE = {"vocabulary_size": 61, "context_length": 32, "num_layers": 2, "num_heads": 4, "width": 32}
LLAMA = {"num_key_value_heads": 2, "mlp_width": 48}
MODELS = {
    "gpt2": lambda: GPT2(GPT2Config(**SHAPE)),
    "llama": lambda: Llama(LlamaConfig(**SHAPE, **LLAMA)),
    "qwen3": lambda: Llama(LlamaConfig(**SHAPE, **LLAMA, head_width=16, qk_norm=True)),
}


@contextmanager
def cuda_guard():
    """Give a CPU build of torch the guard of the meta device for CUDA, whose every call is empty.

    Without one it can make fake tensors of CUDA, but not index or copy them.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * NUM_DEVICE_TYPES).in_dll(library, GUARDS)
    before = guards[CUDA_TYPE]
    guards[CUDA_TYPE] = before or guards[META_TYPE]
    yield
    guards[CUDA_TYPE] = before


@pytest.fixture
def gpu(monkeypatch):
    """Let a test run as if on a Hopper GPU, in bf16 and without gradients."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    # The context manager refuses CUDA where there is none.
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    with cuda_guard(), FakeTensorMode(), torch.no_grad():
        yield
    torch.set_autocast_enabled("cuda", before[0])
    torch.set_autocast_dtype("cuda", before[1])


def on_fake_cuda(model):
    """Replace the parameters of a model by fake ones on CUDA."""
    for module in model.modules():
        for name, own in list(module.named_parameters(recurse=False)):
            fake = torch.empty(own.shape, device=CUDA)
            setattr(module, name, torch.nn.Parameter(fake, requires_grad=False))
    return model


def numbers(*shape, dtype=torch.int64):
    return torch.zeros(shape, dtype=dtype, device=CUDA)


@pytest.mark.parametrize("documents", [0, 1, 3], ids=["none", "one row", "all rows"])
@pytest.mark.parametrize("name", MODELS)
def test_forward_of_a_model_stays_on_the_gpu(gpu, name, documents):
    model, ids = on_fake_cuda(MODELS[name]()), numbers(3, 32)
    ends = numbers(documents, 4, dtype=torch.int32) if documents else None
    loss, count = model(ids, numbers(3, 32), ends)  # whether targets are ids is not waited for
    logits = model(ids, document_ends=ends)
    assert loss.device == count.device == logits.device == CUDA
    assert (loss.dtype, logits.dtype) == (torch.float32, torch.bfloat16)
    assert logits.shape == (3, 32, 61)


@pytest.mark.parametrize("in_compiled_form", [False, True])
@pytest.mark.parametrize("chunk_rows", [None, 8])
def test_the_loss_and_its_gradients_stay_on_the_gpu(gpu, in_compiled_form, chunk_rows, monkeypatch):
    monkeypatch.setattr(loss_module, "_compiled_loss", lambda: loss_module._loss_for_compiler)
    if chunk_rows:
        monkeypatch.setitem(loss_module.CHUNK_BYTES, "cuda", chunk_rows * 128 * 2)
        monkeypatch.setattr(loss_module, "ROWS_MULTIPLE", 1)
    saved = []

    class Context:
        save_for_backward = staticmethod(lambda *tensors: saved.extend(tensors))

    hidden, weight = numbers(20, 32, dtype=torch.bfloat16), numbers(128, 32, dtype=torch.float32)
    options = (61, 1e-4, in_compiled_form, True)  # the last: with gradients
    forward = loss_module._LinearCrossEntropy.forward
    loss = forward(Context, hidden, weight, numbers(20), *options)
    hidden_grad, weight_grad = saved
    assert loss.device == hidden_grad.device == weight_grad.device == CUDA
    assert (hidden_grad.dtype, weight_grad.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("name", MODELS)
def test_trees_of_tokens_are_scored_on_the_gpu(gpu, name):
    model = on_fake_cuda(MODELS[name]())
    trees = TokenTrees(model.config, depths=numbers(2, 16), ends=numbers(2, 16))
    assert model(numbers(2, 16), cache=trees).device == CUDA


def test_what_these_tests_look_for_would_be_found(gpu):
    with pytest.raises(DataDependentOutputException):
        numbers(3, 4).sum().item()
    with pytest.raises(RuntimeError, match="[Uu]nhandled FakeTensor Device Propagation|device"):
        numbers(3) + torch.zeros(3)


@pytest.mark.parametrize("rows", [3, 5])
def test_documents_beyond_a_grid_go_to_several_launches(gpu, rows, monkeypatch):
    launches = []

    def attend(q, k, v, starts, ends, *lengths, **options):
        launches.append(len(starts) - 1)
        return torch.empty_like(q)

    monkeypatch.setattr(document_attention, "varlen_attn", attend)
    monkeypatch.setattr(document_attention, "MAX_GRID_Y", 16)
    monkeypatch.setattr(document_attention, "_causal_option", dict)
    q, k, v = (torch.zeros(rows, 2, 32, 8, dtype=torch.bfloat16, device=CUDA) for _ in range(3))
    boundaries = numbers(rows * 5 + 1, dtype=torch.int32)
    out = document_attention.attend_in_documents(q, k, v, boundaries)
    assert out.shape == q.shape
    assert launches == {3: [15], 5: [15, 10]}[rows]
