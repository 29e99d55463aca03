"""On a GPU: models, loss and attention are the functions that the CPU computes."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from pretrain_lib import GPT2, GPT2Config, Llama, LlamaConfig, save_pretrained
from pretrain_lib.data.windows.packing import IGNORED_TARGET
from pretrain_lib.models import loss as loss_module
from pretrain_lib.models.attention import causal_attention, document_index
from pretrain_lib.models.document_attention import document_boundaries
from pretrain_lib.models.loss import linear_cross_entropy
from pretrain_lib.training.compilation import set_up_model

pytestmark = pytest.mark.cuda
CUDA = torch.device("cuda")
SHAPE = {"vocabulary_size": 500, "context_length": 256, "num_layers": 2}
CONFIGS = {
    "gpt2, heads of 64": GPT2Config(**SHAPE, num_heads=2, width=128),
    "llama, grouped heads of 64": LlamaConfig(
        **SHAPE, num_heads=4, num_key_value_heads=2, width=256, mlp_width=384
    ),
    "qwen3, grouped heads of 128": LlamaConfig(
        **SHAPE,
        num_heads=4,
        num_key_value_heads=2,
        width=256,
        mlp_width=384,
        head_width=128,
        qk_norm=True,
    ),
    "llama, grouped heads of 128": LlamaConfig(
        **SHAPE, num_heads=2, num_key_value_heads=1, width=256, mlp_width=384
    ),
}


@pytest.fixture(params=sorted(CONFIGS))
def config(request):
    torch.compiler.reset()
    torch.backends.cuda.matmul.allow_tf32 = False
    return CONFIGS[request.param]


def build(config):
    model = GPT2(config) if isinstance(config, GPT2Config) else Llama(config)
    return model.initialize(0).to(CUDA)


def batch(config, *, documents=0, seed=0, rows=4, length=256):
    """Return random tokens, in so many documents a row."""
    generator = torch.Generator().manual_seed(seed)
    ids, targets = torch.randint(config.vocabulary_size, (2, rows, length), generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < 0.1] = IGNORED_TARGET
    tensors = {"input_ids": ids, "targets": targets}
    if documents:
        cuts = torch.randint(1, length, (rows, documents - 1), generator=generator)
        ends = torch.cat([cuts.sort(dim=1).values, torch.full((rows, 1), length)], dim=1)
        tensors["document_ends"] = ends.to(torch.int32)
    return {name: tensor.to(CUDA) for name, tensor in tensors.items()}


def loss_and_gradients(model, tensors, *, bf16=False):
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16, cache_enabled=False):
        loss, count = model(**tensors)
    (loss / count).backward()
    return float(loss / count), {name: p.grad.clone() for name, p in model.named_parameters()}


def relative(found, expected):
    difference = torch.cat([(found[n].double() - expected[n].double()).flatten() for n in expected])
    return float(difference.norm() / torch.cat([g.flatten() for g in expected.values()]).norm())


@pytest.mark.parametrize("bf16", [False, True])
def test_loss_and_gradients_are_those_of_transformers(config, bf16, tmp_path):
    model, tensors = build(config), batch(config)
    save_pretrained(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa").to(CUDA)
    loss, gradients = loss_and_gradients(model, tensors)  # ours, whole in fp32
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        logits = theirs.train()(input_ids=tensors["input_ids"], use_cache=False).logits.float()
    expected = F.cross_entropy(
        logits.flatten(0, 1), tensors["targets"].flatten(), ignore_index=IGNORED_TARGET
    )
    expected.backward()
    if bf16:
        loss, gradients = loss_and_gradients(model, tensors, bf16=True)
    assert loss == pytest.approx(float(expected), rel=2e-3 if bf16 else 1e-5)
    by_name = dict(theirs.named_parameters())
    for name, gradient in gradients.items():
        own = by_name[name].grad
        gradient = gradient[: config.vocabulary_size] if gradient.shape[0] == 512 else gradient
        if own.shape != gradient.shape:
            gradient = gradient.T  # GPT-2's projections, of which theirs are transposed
        elif isinstance(config, GPT2Config) and own.dim() == 2 and ".h." in name:
            gradient = gradient.T
        error = float((own - gradient).norm() / own.norm())
        assert error < (3e-2 if bf16 else 1e-4), name


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
@pytest.mark.parametrize("compiled", [False, True])
def test_packed_documents_equal_a_dense_mask(config, compiled, kind):
    tensors = batch(config, documents=5)
    model = build(config)
    _, expected = loss_and_gradients(model, tensors)  # fp32 has no kernel: a dense mask
    set_up_model(model, compiled=compiled, activation_checkpointing=kind)
    loss, gradients = loss_and_gradients(model, tensors, bf16=True)
    plain, _ = loss_and_gradients(build(config), batch(config), bf16=True)
    assert relative(gradients, expected) < 3e-2
    assert abs(loss - plain) > 1e-4  # the mask makes a difference


def test_compiled_equals_eager(config):
    tensors, model = batch(config), build(config)
    expected, gradients = loss_and_gradients(model, tensors, bf16=True)
    set_up_model(model, compiled=True)
    loss, compiled = loss_and_gradients(model, tensors, bf16=True)
    assert loss == pytest.approx(expected, rel=1e-3)
    assert relative(compiled, gradients) < 2e-2


def test_twenty_document_layouts_are_one_graph(config):
    model = build(config)
    set_up_model(model, compiled=True)
    for documents in (4, 9):  # the second width makes it a graph for any
        loss_and_gradients(model, batch(config, documents=documents), bf16=True)
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed in range(20):
            tensors = batch(config, documents=2 + seed, seed=seed)
            loss_and_gradients(model, tensors, bf16=True)


@pytest.mark.parametrize("width", [36, 64, 128, 300])
def test_head_widths_with_and_without_a_kernel(width):
    generator = torch.Generator(CUDA).manual_seed(0)
    options = {"generator": generator, "device": CUDA}
    q, k, v = (torch.randn(2, 4, 128, width, **options).bfloat16() for _ in range(3))
    ends = torch.tensor([[30, 100, 128], [5, 128, 128]], device=CUDA)
    document = document_index(ends, 128)
    mask = (document[:, :, None] == document[:, None, :]).tril()[:, None]
    expected = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), attn_mask=mask)
    found = causal_attention(q, k, v, boundaries=document_boundaries(ends, 128))
    assert float((found.double() - expected).norm() / expected.norm()) < 1e-2


def test_more_documents_than_a_grid_holds():
    rows, length = 80, 1024  # 81,920 documents of one token
    q, k, v = torch.randn(3, rows, 1, length, 64, device=CUDA, dtype=torch.bfloat16)
    ends = torch.arange(1, length + 1, device=CUDA).expand(rows, -1)
    found = causal_attention(q, k, v, boundaries=document_boundaries(ends, length))
    torch.testing.assert_close(found, v)  # each token sees itself alone


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("chunk_rows", [None, 130])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_fused_loss_equals_float64(monkeypatch, compiled, chunk_rows, bf16):
    torch.backends.cuda.matmul.allow_tf32 = False
    rows, width, vocabulary, padded = 640, 64, 1000, 1024
    generator = torch.Generator(CUDA).manual_seed(1)
    hidden = torch.randn(rows, width, generator=generator, device=CUDA).requires_grad_()
    weight = torch.randn(padded, width, generator=generator, device=CUDA).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), generator=generator, device=CUDA)
    targets[::7] = IGNORED_TARGET
    if chunk_rows:
        size = chunk_rows * padded * (2 if bf16 else 4)
        monkeypatch.setitem(loss_module.CHUNK_BYTES, "cuda", size)
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        options = {"vocabulary_size": vocabulary, "z_loss": 1e-4, "compiled": compiled}
        loss, count = linear_cross_entropy(hidden, weight, targets, **options)
        with torch.no_grad():
            same, _ = linear_cross_entropy(hidden, weight, targets, **options)
    loss.backward()
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = h @ w[:vocabulary].T
    counted = logits[targets != IGNORED_TARGET]
    expected = F.cross_entropy(logits, targets, ignore_index=IGNORED_TARGET, reduction="sum")
    (expected + 1e-4 * counted.logsumexp(dim=1).square().sum()).backward()
    assert int(count) == len(counted)
    assert float(loss) == pytest.approx(float(expected), rel=2e-3 if bf16 else 1e-6)
    assert float(same) == pytest.approx(float(loss), rel=1e-6)
    for found, gradient in ((hidden.grad, h.grad), (weight.grad, w.grad)):
        assert float((found - gradient).norm() / gradient.norm()) < (1e-2 if bf16 else 1e-5)
    assert not weight.grad[vocabulary:].any()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("wrong", [-1, 1000, 1023, 2**40])
def test_a_target_that_is_no_id_makes_the_loss_nan(compiled, wrong):
    hidden = torch.randn(64, 32, device=CUDA).requires_grad_()
    weight = torch.randn(1024, 32, device=CUDA).requires_grad_()
    targets = torch.zeros(64, dtype=torch.int64, device=CUDA)
    targets[5] = wrong
    options = {"vocabulary_size": 1000, "compiled": compiled}
    loss, _ = linear_cross_entropy(hidden, weight, targets, **options)
    loss.backward()
    assert loss.isnan() and hidden.grad.isnan().all()
