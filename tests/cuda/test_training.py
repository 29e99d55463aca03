"""On a GPU: steps that do not wait, checkpoints beside training, a run that is killed."""

import json
import os
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs

from pretrain_lib import (
    GPT2,
    GPT2Config,
    TrainingState,
    build_adamw,
    find_newest,
    load_checkpoint,
)
from pretrain_lib.checkpoint.writer import CheckpointWriter
from pretrain_lib.training.compilation import set_up_model
from pretrain_lib.training.step import train_step

pytestmark = pytest.mark.cuda
CONFIG = GPT2Config(vocabulary_size=500, context_length=128, num_layers=2, num_heads=2, width=128)
STEP = {"learning_rate": 1e-3, "max_grad_norm": 1.0, "seed": 0}


@pytest.fixture
def accelerator():
    torch.compiler.reset()
    handlers = [AutocastKwargs(cache_enabled=False)]
    return Accelerator(mixed_precision="bf16", kwargs_handlers=handlers)


def batches(step, count=2):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(500, (count, 2, 4, 128), generator=generator).cuda()
    return [{"input_ids": pair[0], "targets": pair[1]} for pair in ids]


def build(accelerator, *, moments="fp32", compiled=False):
    model = GPT2(CONFIG).initialize(0).to(accelerator.device)
    set_up_model(model, compiled=compiled)
    optimizer = build_adamw(model, learning_rate=1e-3, moments=moments)
    return model, *accelerator.prepare(model, optimizer)


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_a_step_waits_for_the_gpu_once_and_leaves_out_what_is_not_finite(accelerator, moments):
    model, prepared, optimizer = build(accelerator, moments=moments, compiled=True)
    for step in range(2):
        train_step(accelerator, prepared, optimizer, batches(step), **STEP, step=step)
    with torch.no_grad():
        model.transformer["ln_f"].bias[0] = float("nan")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = batches(2)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = train_step(accelerator, prepared, optimizer, inputs, **STEP, step=2)
    torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.message) for w in caught if "synchroniz" in str(w.message)]
    assert result.skipped and len(waits) == 1, waits
    after = model.state_dict()
    assert all(torch.equal(before[n].view(torch.int32), after[n].view(torch.int32)) for n in after)


def test_bf16_moments_on_the_gpu_are_those_of_the_cpu():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(300, 200, generator=generator)
    gradients = [torch.randn(300, 200, generator=generator) for _ in range(5)]
    results = []
    for device in ("cpu", "cuda"):
        layer = torch.nn.Linear(200, 300, bias=False).to(device)
        with torch.no_grad():
            layer.weight.copy_(start)
        optimizer = build_adamw(layer, learning_rate=1e-2, moments="bf16")
        for gradient in gradients:
            layer.weight.grad = gradient.to(device)
            optimizer.step()
        results.append(layer.weight.detach().cpu())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_written_beside_a_step_is_bit_equal_to_one_at_rest(accelerator, tmp_path):
    model, prepared, optimizer = build(accelerator)
    for step in range(2):
        train_step(accelerator, prepared, optimizer, batches(step), **STEP, step=step)
    options = {"tokenizer": None, "manifest": {}}
    writers = [CheckpointWriter(tmp_path / name, model, **options) for name in ("rest", "beside")]
    state = TrainingState(step=2)
    writers[0].start(state, model, optimizer)
    rest = writers[0].wait()
    torch.cuda.synchronize()
    writers[1].start(state, model, optimizer)
    for batch in batches(2, count=8):  # forward and backward go on while it is written
        with accelerator.autocast():
            loss, _ = prepared(**batch)
        accelerator.backward(loss)
    beside = writers[1].wait()
    files = [path.relative_to(rest.path) for path in rest.path.rglob("*.safetensors")]
    assert files
    for name in files:
        assert (rest.path / name).read_bytes() == (beside.path / name).read_bytes()


def test_resumed_steps_are_bit_equal(accelerator, tmp_path):
    model, prepared, optimizer = build(accelerator, compiled=True)
    writer = CheckpointWriter(tmp_path, model, tokenizer=None, manifest={})
    losses = []
    for step in range(6):
        if step == 3:
            writer.start(TrainingState(step=3), model, optimizer)
            writer.wait()  # it reads what the update changes
        result = train_step(accelerator, prepared, optimizer, batches(step), **STEP, step=step)
        losses.append((result.loss, result.grad_norm))
    other, prepared, optimizer = build(accelerator, compiled=True)
    load_checkpoint(find_newest(tmp_path), other, optimizer)
    for step in range(3, 6):
        result = train_step(accelerator, prepared, optimizer, batches(step), **STEP, step=step)
        assert (result.loss, result.grad_norm) == losses[step]


RUN = """
import os, signal, sys
import torch
import pretrain_lib as pl
from pretrain_lib.training import loop
folder, data, kill_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
config = pl.Recipe(
    model=pl.GPT2Config(
        vocabulary_size=500, context_length=64, num_layers=2, num_heads=2, width=128
    ),
    data=pl.DataConfig(path=data, validation="none"),
    batch=pl.BatchConfig(tokens=1024, micro_batch=4, sequence_length=64),
    optimizer=pl.OptimizerConfig(learning_rate=1e-3),
    schedule=pl.ScheduleConfig(tokens=1024 * 30, warmup_tokens=2048),
    samples=pl.SampleConfig(),
    run=pl.RunConfig(dir=folder),
    checkpoint=pl.CheckpointConfig(every=5),
)
record = loop._record
def kill(run, result, **options):
    record(run, result, **options)
    if run.state.step == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
loop._record = kill
corpus = pl.open_corpus(config)
accelerator = pl.start_accelerator(config)
with torch.device("meta"):
    model = pl.GPT2(config.model)
print(accelerator.distributed_type, pl.train(config, model, corpus, accelerator))
"""


def run(folder, data, *, kill_at=-1, **environment):
    environment = os.environ | {"ACCELERATE_MIXED_PRECISION": "bf16"} | environment
    command = [sys.executable, "-c", RUN, str(folder), str(data), str(kill_at)]
    return subprocess.Popen(command, env=environment, stdout=-1, stderr=subprocess.STDOUT)


def losses(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(r["step"], r["loss"], r["grad_norm"]) for r in rows if r["kind"] == "train"]


def test_killed_and_resumed_or_under_nccl_a_run_is_the_same(tmp_path):
    data = tmp_path / "tokens.bin"
    np.random.default_rng(0).integers(0, 500, 40_000).astype("<u2").tofile(data)
    nccl = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}
    nccl |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    first = {
        "whole": run(tmp_path / "whole", data),
        "killed": run(tmp_path / "killed", data, kill_at=17),
        "nccl": run(tmp_path / "nccl", data, **nccl),
    }
    output = {name: process.communicate()[0].decode() for name, process in first.items()}
    assert first["whole"].returncode == first["nccl"].returncode == 0, output
    assert first["killed"].returncode == -signal.SIGKILL, output["killed"]
    assert "MULTI_GPU done" in output["nccl"] and "NO done" in output["whole"], output
    again = run(tmp_path / "killed", data)
    text = again.communicate()[0].decode()
    assert again.returncode == 0 and "resumed at step 15" in text, text
    whole = losses(tmp_path / "whole")
    assert len(whole) == 30
    assert losses(tmp_path / "killed") == whole
    for a, b in zip(losses(tmp_path / "nccl"), whole, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
