"""Memory from shapes: against sums by hand, what autograd keeps, and what a step allocates."""

from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function

from pretrain_lib.models.any_model import build_model
from pretrain_lib.models.gpt2 import GPT2, GPT2Config
from pretrain_lib.models.llama import Llama, LlamaConfig
from pretrain_lib.models.loss import CHUNK_BYTES
from pretrain_lib.optim.groups import build_adamw, build_muon
from pretrain_lib.plan.layers import document_attention_bytes
from pretrain_lib.plan.memory import estimate_memory, model_sizes
from pretrain_lib.plan.muon import muon_cost
from pretrain_lib.plan.network import World, sent_bytes
from pretrain_lib.plan.step import Step
from pretrain_lib.training.compilation import set_up_model
from tests.families import OWN_LOGITS, family

SHAPE = {"vocabulary_size": 4096, "context_length": 256, "num_layers": 4, "num_heads": 4}
LLAMA = {"num_key_value_heads": 2, "mlp_width": 704}
BUILDERS = {
    "gpt2": lambda **o: GPT2(GPT2Config(**SHAPE | {"width": 256} | o)),
    "llama": lambda **o: Llama(LlamaConfig(**SHAPE | LLAMA | {"width": 256} | o)),
    "tied llama": lambda **o: Llama(
        LlamaConfig(**SHAPE | LLAMA | {"width": 256, "tied_head": True} | o)
    ),
    "qwen3": lambda **o: Llama(
        LlamaConfig(**SHAPE | LLAMA | {"width": 256, "qk_norm": True, "head_width": 96} | o)
    ),
}


def on_meta(model_type, config):
    with torch.device("meta"):
        return model_type(config)


# GPT-2 124M: 12 layers, D = 768, H = 12, V = 50,304; a micro-batch of 16 x 1,024 = 16,384 tokens.
GPT2_TABLE = 50_304 * 768  # 38,633,472
GPT2_MATRICES = 768 * 2304 + 768 * 768 + 2 * 768 * 3072  # 7,077,888 in a layer
GPT2_LAYER = GPT2_MATRICES + 2304 + 768 + 3072 + 768 + 4 * 768  # with biases and norms
GPT2_ROOT = GPT2_TABLE + 1024 * 768 + 2 * 768
GPT2_ALL = 12 * GPT2_LAYER + GPT2_ROOT  # 124,475,904: 47 rows of padding in it
# LLaMA 1.3B: 24 layers, D = 2048, F = 5632, H = 32, V = 8,192; 4 x 2,048 = 8,192 tokens.
LLAMA_MATRICES = 4 * 2048 * 2048 + 3 * 2048 * 5632
LLAMA_LAYER = LLAMA_MATRICES + 2 * 2048
LLAMA_ALL = 24 * LLAMA_LAYER + 2 * 8192 * 2048 + 2048  # 1,266,780,160

# Bytes a token that a layer keeps under bf16 autocast on CUDA, in the order of its forward. fp32
# are the inputs of the norms, their statistics, and the log-sum-exp of attention.
GPT2_KEPT = (
    (4 * 768 + 8)  # ln_1: input, mean, deviation
    + 2 * 768 + 2 * 3 * 768 + 2 * 768 + 4 * 12  # output; q, k, v; attention, log-sum-exp
    + (4 * 768 + 8)  # ln_2
    + 2 * 768 + 2 * 3072 + 2 * 3072  # output; before GELU, after it
)  # fmt: skip
LLAMA_EAGER = (
    (4 * 2048 + 4)  # norm: input, deviation
    + 3 * 2 * 2048 + 3 * 2 * 2048 + 2 * 2048 + 4 * 32  # input of q, k, v; they; attention
    + (4 * 2048 + 4)
    + 2 * 2 * 2048 + 4 * 2 * 5632  # input of gate, up; gate, SiLU of it, up, product
)  # fmt: skip
# Compiled for CUDA, as counted by benchmarks/null_gpu.py: 70,792 bytes and an eighth of one more.
LLAMA_KEPT = LLAMA_EAGER - 4 * 2 * 2048 - 2 * 5632
# Selectively: the layer's input, and what matrix products and attention return.
GPT2_SELECTED = 4 * 768 + 2 * (2304 + 768 + 768 + 3072 + 768) + 4 * 12
LLAMA_SELECTED = 4 * 2048 + 2 * (3 * 2048 + 2048 + 2048 + 2 * 5632 + 2048) + 4 * 32

GPT2_ACTIVATIONS = {  # and the last norm's input
    "none": 12 * (16_384 * GPT2_KEPT + 2 * GPT2_MATRICES) + 16_384 * 4 * 768,
    "selective": 12 * 16_384 * GPT2_SELECTED + 16_384 * 4 * 768,
    "full": 13 * 16_384 * 4 * 768,
}
LLAMA_ACTIVATIONS = {
    "none": 24 * (8192 * LLAMA_KEPT + 2 * LLAMA_MATRICES) + 8192 * 4 * 2048,
    "selective": 24 * 8192 * LLAMA_SELECTED + 8192 * 4 * 2048,
    "full": 25 * 8192 * 4 * 2048,
}
# Hidden states in fp32, in bf16, their gradient; the table in bf16; the logits, which are one
# chunk, in bf16; the gradient of the table in fp32.
GPT2_LOSS = 16_384 * 768 * 8 + 2 * GPT2_TABLE + 2 * 16_384 * 50_304 + 4 * GPT2_TABLE
LLAMA_LOSS = 8192 * 2048 * 8 + 2 * 8192 * 2048 + 2 * 8192 * 8192 + 4 * 8192 * 2048
# A layer's backward is highest at the product of gate and up: its gradient in fp32, theirs in bf16;
# and the gradient of a matrix in fp32.
LLAMA_WORKING = 8192 * (4 * 2048 + 2 * 2 * 5632) + 4 * 2048 * 5632


@pytest.mark.parametrize("activation_checkpointing", ["none", "selective"])
def test_gpt2_124m_takes_what_a_sum_by_hand_says(activation_checkpointing):
    step = Step(
        sequences=16,
        length=1024,
        micro_batches=32,
        activation_checkpointing=activation_checkpointing,
    )
    memory = estimate_memory(on_meta(GPT2, GPT2Config()), step)
    assert GPT2_ALL == 124_439_808 + 47 * 768
    state = (4 * GPT2_ALL, 4 * GPT2_ALL, 8 * GPT2_ALL)
    assert (memory.weights, memory.gradients, memory.moments, memory.buffers) == (*state, 0)
    assert memory.activations == GPT2_ACTIVATIONS[activation_checkpointing]
    assert memory.loss == GPT2_LOSS == 1_980_825_600
    assert memory.peak == 16 * GPT2_ALL + GPT2_ACTIVATIONS[activation_checkpointing] + GPT2_LOSS


def test_without_a_compiler_the_logits_are_there_in_fp32_too():
    step = Step(sequences=16, length=1024, micro_batches=32, compiled=False)
    loss = estimate_memory(on_meta(GPT2, GPT2Config()), step).loss
    assert loss == GPT2_LOSS - 4 * GPT2_TABLE + 4 * 16_384 * 50_304


def test_without_a_compiler_layers_of_llama_keep_each_copy():
    step = Step(4, 2048, 64, compiled=False)
    activations = estimate_memory(on_meta(Llama, LlamaConfig()), step).activations
    assert activations == 24 * (8192 * LLAMA_EAGER + 2 * LLAMA_MATRICES) + 8192 * 4 * 2048
    assert LLAMA_KEPT == 70_792


@pytest.mark.parametrize(
    ("rows", "documents", "counted"),  # the last by benchmarks/null_gpu.py, beyond one document
    [
        (16, 64, 587_465_728 - 184_910_848),
        (16, 1024, 6_721_635_328 - 184_910_848),
        (64, 64, 2_350_908_416 - 739_640_320),
        (64, 1024, 26_871_969_280 - 739_640_320),
    ],
)
def test_attention_in_documents_takes_what_was_counted_on_cuda(rows, documents, counted):
    one, many = (
        document_attention_bytes(GPT2Config(), Step(rows, 1024, documents=rows * number))
        for number in (1, documents)
    )
    assert many - one == pytest.approx(counted, rel=0.05)


def test_many_documents_raise_the_peak_on_cuda_alone():
    model = on_meta(GPT2, GPT2Config())
    plain, few, many = (
        estimate_memory(model, Step(16, 1024, documents=number)).peak for number in (0, 64, 16_384)
    )
    assert plain == few < many - 10**9
    on_cpu = [
        estimate_memory(model, Step(16, 1024, on_cuda=False, documents=number)).peak
        for number in (0, 16_384)
    ]
    assert on_cpu[0] == on_cpu[1]


@pytest.mark.parametrize("activation_checkpointing", ["none", "selective"])
def test_llama_1_3b_takes_what_a_sum_by_hand_says(activation_checkpointing):
    step = Step(4, 2048, 64, activation_checkpointing=activation_checkpointing, moments="bf16")
    memory = estimate_memory(on_meta(Llama, LlamaConfig()), step)
    assert LLAMA_ALL == 1_266_780_160
    assert (memory.weights, memory.gradients, memory.moments) == (4 * LLAMA_ALL,) * 3
    assert memory.activations == LLAMA_ACTIVATIONS[activation_checkpointing]
    assert memory.loss == LLAMA_LOSS == 369_098_752
    # The loss is small: where much is computed again, the backward of the last layer is higher.
    again = 8192 * (LLAMA_KEPT + 2 * 2 * 2048 - LLAMA_SELECTED) + 2 * LLAMA_MATRICES
    highest = {"none": LLAMA_LOSS, "selective": again + LLAMA_WORKING}[activation_checkpointing]
    assert memory.peak == 12 * LLAMA_ALL + LLAMA_ACTIVATIONS[activation_checkpointing] + highest


def test_full_recomputation_keeps_the_inputs_of_the_layers_and_one_layer_at_work():
    for model, step, kept in (
        (
            on_meta(GPT2, GPT2Config()),
            Step(16, 1024, 32, activation_checkpointing="full"),
            GPT2_ACTIVATIONS,
        ),
        (
            on_meta(Llama, LlamaConfig()),
            Step(4, 2048, 64, activation_checkpointing="full"),
            LLAMA_ACTIVATIONS,
        ),
    ):
        memory = estimate_memory(model, step)
        assert memory.activations == kept["full"]
    again = 8192 * (LLAMA_KEPT - 4 * 2048) + 2 * LLAMA_MATRICES
    assert memory.peak == 16 * LLAMA_ALL + kept["full"] + again + LLAMA_WORKING


def test_what_several_devices_hold_is_a_sum_by_hand():
    model, step = on_meta(Llama, LlamaConfig()), Step(4, 2048, 8)
    shared = LLAMA_ACTIVATIONS["none"] + LLAMA_LOSS
    ddp = estimate_memory(model, step, World(8))
    assert ddp.buffers == 4 * LLAMA_ALL and ddp.peak == 20 * LLAMA_ALL + shared
    # Whole gradients until the last micro-batch; gathered are two layers, and what is in none.
    fsdp = estimate_memory(model, step, World(8, 8))
    gathered = 2 * LLAMA_LAYER + 2 * 8192 * 2048 + 2048
    parts = (fsdp.weights, fsdp.gradients, fsdp.moments, fsdp.buffers)
    assert parts == (LLAMA_ALL // 2, 4 * LLAMA_ALL, LLAMA_ALL, 4 * gathered)
    assert fsdp.peak == sum(parts) + shared
    # With one micro-batch no gradients wait: in backward there are the head's and two layers'.
    hsdp = estimate_memory(model, Step(4, 2048), World(64, 8))
    assert hsdp.gradients == LLAMA_ALL // 2
    gradients = 4 * (8192 * 2048 + 2 * LLAMA_LAYER)
    state = hsdp.weights + hsdp.moments + hsdp.buffers
    assert hsdp.peak == state + gradients + LLAMA_ACTIVATIONS["none"] + LLAMA_WORKING
    # Gathered in bf16, half of the bytes, and no copies of the weights for autocast.
    bf16 = estimate_memory(model, step, World(8, 8, gather_bytes=2))
    assert bf16.buffers == 2 * gathered
    assert fsdp.activations - bf16.activations == 24 * 2 * LLAMA_MATRICES


def test_evaluation_gathers_the_whole_of_a_sharded_model():
    model = on_meta(Llama, LlamaConfig())
    step = Step(1, 8, activation_checkpointing="full")
    memory = estimate_memory(model, step, World(1024, 1024))
    assert memory.peak == memory.weights + memory.moments + 4 * LLAMA_ALL


def test_bytes_on_the_network_are_those_of_rings():
    sizes = model_sizes(on_meta(GPT2, GPT2Config()))
    assert (sizes.total, sizes.block, sizes.root) == (GPT2_ALL, GPT2_LAYER, GPT2_ROOT)
    gradients, gathered = 4 * GPT2_ALL, 4 * (2 * 12 * GPT2_LAYER + GPT2_ROOT)
    assert sent_bytes(sizes, World(), micro_batches=32) == 0
    assert sent_bytes(sizes, World(8), micro_batches=4) == 2 * 7 / 8 * gradients
    fsdp = sent_bytes(sizes, World(8, 8), micro_batches=4)
    assert fsdp == 7 / 8 * (4 * gathered + gradients)
    hsdp = sent_bytes(sizes, World(32, 8), micro_batches=1)
    assert hsdp == 7 / 8 * (gathered + gradients) + 2 * 3 / 4 * gradients / 8
    halved = sent_bytes(sizes, World(8, 8, gather_bytes=2), micro_batches=4)
    assert halved == 7 / 8 * (4 * gathered / 2 + gradients)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", BUILDERS)
def test_a_layer_keeps_what_autograd_saves(name, precision):
    saved, estimated = [], []
    for layers in (1, 2):
        model = BUILDERS[name](num_layers=layers, width=64).initialize(0)
        saved.append(saved_bytes(model, precision, sequences=2, length=32))
        step = Step(2, 32, precision=precision, on_cuda=False)
        estimated.append(estimate_memory(model, step).activations)
    assert saved[1] - saved[0] == estimated[1] - estimated[0]


def saved_bytes(model, precision, *, sequences, length):
    """Return the bytes of all storages that forward keeps for backward, parameters aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.zeros(sequences, length, dtype=torch.int64)
    low = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)
    with saved_tensors_hooks(pack, lambda tensor: tensor), low:
        loss, _ = model(ids, ids)
        assert loss.requires_grad
        return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "activation_checkpointing", "micro_batches"),
    [
        ("fp32", "none", 1),
        ("fp32", "selective", 2),
        ("fp32", "full", 1),
        ("fp32", "full", 2),
        ("bf16", "none", 1),
        ("bf16", "selective", 2),
        ("bf16", "full", 2),
    ],
)
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_a_step_allocates_what_is_estimated(
    name, precision, activation_checkpointing, micro_batches
):
    # A CPU without bf16 units is very slow in it.
    width, length = {"bf16": (128, 128), "fp32": (256, 256)}[precision]
    model = BUILDERS[name](width=width).initialize(0)
    moments = "bf16" if activation_checkpointing == "full" else "fp32"
    step = Step(
        2, length, micro_batches, precision, activation_checkpointing, moments, on_cuda=False
    )
    measured = allocated_at_most(model, step)
    assert estimate_memory(model, step).peak == pytest.approx(measured, rel=0.03)


@pytest.mark.moderate
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", OWN_LOGITS)
def test_logits_that_a_model_makes_itself_are_in_the_estimate(
    name, precision, several, monkeypatch
):
    if several:  # chunks
        monkeypatch.setitem(CHUNK_BYTES, "cpu", 2**20)
    model = build_model(family(name, vocab_size=4096, hidden_size=64)).initialize(0)
    step = Step(2, 64, precision=precision, on_cuda=False)
    measured = allocated_at_most(model, step)
    estimate = estimate_memory(model, step)
    assert estimate.peak == pytest.approx(measured, rel=0.05)
    assert estimate.loss > 0.2 * estimate.peak  # so it is at the height


@pytest.mark.moderate
@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_every_pass_of_a_loop_over_layers_is_in_the_estimate(kind):
    shape = {"vocab_size": 61, "hidden_size": 64, "head_dim": 16, "num_hidden_layers": 4}
    loop = {"n_input_layers": 1, "n_output_layers": 1, "n_recurrent_loops": 5}
    model = build_model(family("dory", **shape, **loop)).initialize(0)
    step = Step(64, 64, precision="fp32", activation_checkpointing=kind, on_cuda=False)
    measured = allocated_at_most(model, step)
    assert estimate_memory(model, step).peak == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(("length", "moments"), [(8, "fp32"), (8, "bf16"), (256, "fp32")])
@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_a_step_with_muon_allocates_what_is_estimated(name, length, moments):
    model = BUILDERS[name](vocabulary_size=8192).initialize(0)
    step = Step(1, length, precision="fp32", moments=moments, muon=True, on_cuda=False)
    measured = allocated_at_most(model, step)
    assert estimate_memory(model, step).peak == pytest.approx(measured, rel=0.05)


def test_muon_sends_each_matrix_once_or_its_rows_there_and_back():
    model = on_meta(GPT2, GPT2Config())
    elements = 12 * GPT2_MATRICES
    alone, ddp, fsdp, hsdp = (
        muon_cost(model, world, itemsize=2)
        for world in (World(), World(8), World(8, 8), World(32, 8))
    )
    assert {cost.elements for cost in (alone, ddp, fsdp, hsdp)} == {elements}
    assert alone.sent_bytes == 0
    assert ddp.sent_bytes == 7 / 8 * 2 * elements
    assert fsdp.sent_bytes == hsdp.sent_bytes == 2 * 7 / 8 * 2 * elements / 8
    # In a layer four squares of 768, and two matrices of 768 x 3,072; 2 of 12 layers on a device.
    square, oblong = 5 * 6 * 768**3, 5 * (4 * 768**2 * 3072 + 2 * 768**3)
    assert alone.flops == 12 * (4 * square + 2 * oblong)
    assert ddp.flops == fsdp.flops == hsdp.flops == 2 * (4 * square + 2 * oblong)


STEPS_OF_TWO = 4


@pytest.mark.slow
@pytest.mark.parametrize("world", [World(2), World(2, 2)], ids=["DDP", "FSDP2"])
def test_a_process_of_two_allocates_what_is_estimated(world, tmp_path):
    step = Step(2, 256, micro_batches=2, precision="fp32", on_cuda=False)
    arguments = (step, world, str(tmp_path))
    torch.multiprocessing.start_processes(step_of_two, arguments, 2, start_method="forkserver")
    measured = int((tmp_path / "bytes").read_text())
    estimate = estimate_memory(BUILDERS["llama"](), step, world)
    # gloo also holds what it is sending: up to all gradients, if the other process is late.
    assert 0.95 * estimate.peak <= measured <= 1.05 * (estimate.peak + estimate.gradients)


def step_of_two(rank, step, world, folder):
    """Make steps as one of two processes; write the height in bytes of the lowest but the first."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = BUILDERS["llama"]().initialize(0)
        if world.is_sharded:
            for block in model.blocks:
                fully_shard(block)
            wrapped = fully_shard(model)
        else:
            wrapped = DistributedDataParallel(model)
        optimizer = build_adamw(wrapped, learning_rate=1e-4)
        make_step(wrapped, optimizer, step)
        for number in range(STEPS_OF_TWO + 1):  # the last begins after what is looked at
            with record_function(f"step {number}"):
                make_step(wrapped, optimizer, step)
    if rank == 0:
        names = [f"step {number}" for number in range(STEPS_OF_TWO + 1)]
        heights = [highest(profiler, *pair) for pair in pairwise(names)]
        (Path(folder) / "bytes").write_text(str(min(heights)))
    dist.destroy_process_group()


def allocated_at_most(model, step):
    """Return the bytes of all tensors at the height of a second step, by torch's allocator."""
    set_up_model(model, compiled=False, activation_checkpointing=step.activation_checkpointing)
    build = build_muon if step.muon else build_adamw
    optimizer = build(model, learning_rate=1e-4, moments=step.moments)
    make_step(model, optimizer, step)
    state = [t for values in optimizer.state.values() for t in values.values()]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        make_step(model, optimizer, step)
    return sum(t.nbytes for t in (*model.parameters(), *state)) + highest(profiler)


def highest(profiler, since=None, until=None):
    """Return the bytes allocated at most in a profile, or between the beginnings of two things."""
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    live, most, begun = 0, 0, since is None
    for event in events:
        begun = (begun or event.name() == since) and event.name() != until
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live * begun)
    return most


def make_step(model, optimizer, step):
    low = {"enabled": step.precision == "bf16", "cache_enabled": False}
    for micro_batch in range(step.micro_batches):
        last, silent = micro_batch == step.micro_batches - 1, nullcontext()
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
        elif isinstance(model, DistributedDataParallel) and not last:
            silent = model.no_sync()
        size = getattr(model, "module", model).config.vocabulary_size
        ids = torch.randint(size, (step.sequences, step.length))
        with silent:
            with torch.autocast("cpu", torch.bfloat16, **low):
                loss, targets = model(ids, ids)
            (loss / targets).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
