"""What is compiled, or computed again in backward, is the same function; in one graph."""

import pytest
import torch
from accelerate import Accelerator
from torch._dynamo.backends.debugging import aot_eager

from pretrain_lib.models.gpt2 import GPT2, GPT2Config
from pretrain_lib.models.llama import Llama, LlamaConfig
from pretrain_lib.optim.groups import build_adamw
from pretrain_lib.training.compilation import choose_compile, run_eagerly, set_up_model
from pretrain_lib.training.step import train_step
from tests.compilation import without_code_generation

SHAPE = {"vocabulary_size": 61, "context_length": 32, "num_layers": 2, "num_heads": 4, "width": 32}
MODELS = {
    "gpt2": lambda **options: GPT2(GPT2Config(**SHAPE, **options)),
    "llama": lambda: Llama(LlamaConfig(**SHAPE, num_key_value_heads=2, mlp_width=48)),
    "qwen3": lambda: Llama(
        LlamaConfig(**SHAPE, num_key_value_heads=2, mlp_width=48, head_width=12, qk_norm=True)
    ),
}

# Of these the compiler writes code; of the others it makes the graphs, which is what differs.
GENERATED = (("gpt2", False, "none"), ("llama", True, "selective"), ("qwen3", True, "none"))


def batch(seed, *, documents=False, rows=3):
    generator = torch.Generator().manual_seed(seed)
    ids, targets = torch.randint(61, (2, rows, 32), generator=generator)
    tensors = {"input_ids": ids, "targets": targets}
    if documents:
        cuts = torch.randint(1, 33, (rows, 9), generator=generator).sort(dim=1).values
        tensors["document_ends"] = torch.cat([cuts, torch.full((rows, 3), 32)], dim=1)
    return tensors


def loss_and_gradients(model, tensors):
    model.zero_grad()
    loss, _ = model(**tensors)
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]


@pytest.fixture(params=sorted(MODELS))
def family(request):
    torch.compiler.reset()
    return request.param


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("kind", ["selective", "full"])
def test_recomputing_changes_no_bit(family, kind, documents):
    model = MODELS[family]().initialize(0)
    tensors = batch(0, documents=documents)
    expected = loss_and_gradients(model, tensors)
    set_up_model(model, compiled=False, activation_checkpointing=kind)
    loss, gradients = loss_and_gradients(model, tensors)
    assert torch.equal(loss, expected[0])
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected[1], strict=True))


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_dropout_is_the_same_when_computed_again(kind):
    model = MODELS["gpt2"](dropout=0.3).initialize(0)
    results = []
    for each in ("none", kind):
        set_up_model(model, compiled=False, activation_checkpointing=each)
        torch.manual_seed(5)
        results.append(loss_and_gradients(model, batch(1)))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


class SavedBytes:
    """Counts the bytes that a forward keeps for backward, parameters left out."""

    def __init__(self, model):
        self.own = {parameter.data_ptr() for parameter in model.parameters()}
        self.storages = {}

    def __call__(self, tensor):
        if tensor.data_ptr() not in self.own:
            storage = tensor.untyped_storage()
            self.storages[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    @property
    def total(self):
        return sum(size for size, _ in self.storages.values())


def kept_bytes(family, kind, *, compiled):
    model = MODELS[family]().initialize(0)
    set_up_model(model, compiled=compiled, activation_checkpointing=kind)
    counter = SavedBytes(model)
    with torch.autograd.graph.saved_tensors_hooks(counter, lambda tensor: tensor):
        model(**batch(0))
    return counter.total


def test_full_activation_checkpointing_keeps_little_but_the_inputs_of_the_blocks(family):
    # What is kept selectively without a compiler is not seen here: plan/test_memory.py counts it.
    everything, inputs = (kept_bytes(family, kind, compiled=False) for kind in ("none", "full"))
    assert inputs < 0.4 * everything


@pytest.mark.slow
def test_a_compiler_keeps_what_activation_checkpointing_says(family, monkeypatch):
    without_code_generation(monkeypatch)
    everything, selected, inputs = (
        kept_bytes(family, kind, compiled=True) for kind in ("none", "selective", "full")
    )
    assert inputs < 0.5 * everything
    assert inputs < selected < 0.9 * everything


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "selective", "full"])
@pytest.mark.parametrize("documents", [False, True])
def test_the_compiled_model_is_the_same_function(family, documents, kind, monkeypatch):
    if (family, documents, kind) not in GENERATED:
        without_code_generation(monkeypatch)
    model = MODELS[family]().initialize(0)
    tensors = batch(2, documents=documents)
    expected = loss_and_gradients(model, tensors)
    set_up_model(model, compiled=True, activation_checkpointing=kind)
    loss, gradients = loss_and_gradients(model, tensors)
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients, expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not any("_orig_mod" in name for name in model.state_dict())


@pytest.mark.slow
def test_twenty_document_layouts_are_one_graph_without_a_break(family):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    model = MODELS[family]().initialize(0)
    for block in model.blocks:
        block.compile(backend=count, fullgraph=True)
    loss_and_gradients(model, batch(0, documents=True))
    first = len(graphs)
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed in range(1, 20):
            loss_and_gradients(model, batch(seed, documents=True))
    assert first == len(graphs) == 1  # and all blocks share it


@pytest.mark.slow
def test_evaluation_does_not_compile_and_leaves_what_is_compiled(family):
    graphs = []
    model = MODELS[family]().initialize(0)
    for block in model.blocks:
        block.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    model(**batch(0))
    compiled = len(graphs)
    with run_eagerly(), torch.no_grad():
        for rows in (1, 2, 5):
            model.eval()(batch(rows, rows=rows)["input_ids"])
    model.train()(**batch(1))
    assert compiled == len(graphs) > 0


@pytest.mark.slow
def test_steps_of_the_compiled_model_are_those_of_the_eager_one(family):
    losses = []
    for compiled in (False, True):
        model = MODELS[family]().initialize(0)
        set_up_model(model, compiled=compiled)
        accelerator = Accelerator(cpu=True)
        optimizer = build_adamw(model, learning_rate=1e-3)
        model, optimizer = accelerator.prepare(model, optimizer)
        options = {"learning_rate": 1e-3, "max_grad_norm": 1.0, "seed": 0}
        losses.append(
            [
                train_step(
                    accelerator, model, optimizer, [batch(s), batch(s + 50)], **options, step=s
                ).loss
                for s in range(5)
            ]
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_z_loss_is_part_of_training_and_not_of_validation(family):
    model = MODELS[family]().initialize(0)
    tensors = batch(3)
    plain, _ = model(**tensors)
    set_up_model(model, compiled=False, z_loss=0.1)
    loss, _ = model(**tensors)
    assert torch.equal(loss, plain)  # it is told without the z-loss, which is in the gradients
    squares = model(tensors["input_ids"]).logsumexp(dim=-1).square().sum()
    parameters = list(model.parameters())
    expected = torch.autograd.grad(plain + 0.1 * squares, parameters)
    for found, gradient in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-4)
    assert torch.equal(model.eval()(**tensors)[0], plain)


def test_compiling_on_a_cpu_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setenv("PATH", "")
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    with pytest.raises(ValueError, match="system.compile=true needs a C.. compiler on a CPU, and"):
        choose_compile(True, cpu)
    assert (choose_compile(None, cpu), choose_compile(None, gpu)) == (False, True)
    assert choose_compile(True, gpu) is True
