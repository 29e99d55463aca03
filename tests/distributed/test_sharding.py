"""Whole recipes under FSDP2: real processes, their checkpoints, their kills, their guards."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

from pretrain_lib import GPT2, load_pretrained, start_accelerator, verify_checkpoint
from pretrain_lib.distributed.sharding import _read_one_token, build_sharding, check_sharding
from pretrain_lib.export.export import export_checkpoint
from tests.conftest import (
    accelerate_script,
    change,
    forked_launchers,
    launcher_environment,
    read_rows,
    tiny_flags,
)
from tests.distributed.test_launched import processes_of, start, wait_for_step
from tests.forks import forked_python
from tests.models.test_models import SMALL

CONFIG = ["--config_file", "accelerate_configs/cpu_2proc.yaml", "--mixed_precision", "no"]
RECIPE = "recipes/gpt2_124m.py"
SHARDED = ["tests/fsdp_on_cpu.py", RECIPE]


def command(script, flags, *, processes=2):
    launch = ["accelerate", "launch", *CONFIG, "--num_processes", str(processes)]
    return [*launch, *script, *flags, "--system.processes", str(processes)]


def run(script, flags, *, processes=2, resumable=False, **environment):
    options = launcher_environment()
    options["env"] |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **environment}
    _, *rest = command(script, flags, processes=processes)
    given = [forked_python(), accelerate_script(), *map(str, rest)]
    result = subprocess.run(given, **options, timeout=300)
    assert result.returncode == (1 if resumable else 0), result.stderr[-4000:]
    return result.stdout


def flags_of(prepared, folder, *more):
    samples = ["--samples.prompts", "[def ]", "--samples.tokens", "8", "--samples.every", "4"]
    saves = [
        "--checkpoint.every",
        "3",
        "--checkpoint.keep_last",
        "0",
        "--data.document_masking",
        "true",
    ]
    return [*tiny_flags(prepared, folder), *samples, *saves, *more]


@pytest.fixture(scope="module")
def unsharded(prepared, tmp_path_factory):
    """The run of two processes under DDP."""
    folder = tmp_path_factory.mktemp("ddp") / "run"
    run([RECIPE], flags_of(prepared, folder))
    return folder


def files_of(path):
    return sorted(f.relative_to(path).as_posix() for f in path.rglob("*") if f.is_file())


def assert_same_curve(one, other):
    rows = read_rows(one), read_rows(other)
    assert [(r["kind"], r["step"]) for r in rows[0]] == [(r["kind"], r["step"]) for r in rows[1]]
    for a, b in zip(*rows, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["targets"] == b["targets"]


@pytest.mark.slow
def test_a_sharded_run_is_the_run_and_its_checkpoints_are_folders_for_transformers(
    prepared, unsharded, tmp_path
):
    said = run(SHARDED, flags_of(prepared, tmp_path / "run"))
    assert "2 processes, each on: CPU with 1 thread, fp32, FSDP2" in said
    assert said.count("done at step 8") == 1  # the other process is quiet
    assert_same_curve(tmp_path / "run", unsharded)
    texts = [(folder / "samples.jsonl").read_text() for folder in (tmp_path / "run", unsharded)]
    assert texts[0] == texts[1]
    path = tmp_path / "run" / "checkpoints" / "step-00000008"
    files = [name for name in files_of(path) if "0000" in name]
    assert files == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "training/optimizer-00001-of-00002.safetensors",
        "training/optimizer-00002-of-00002.safetensors",
    ]
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = torch.arange(64).view(2, 32)
    with torch.no_grad():
        ours = [load_pretrained(p)(ids) for p in (path, unsharded / "checkpoints" / path.name)]
        torch.testing.assert_close(theirs(ids).logits, ours[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(ours[0], ours[1], atol=1e-4, rtol=0)


def continue_elsewhere(run_folder, folder, *, step):
    """Copy a run as it was when it had come to a checkpoint."""
    shutil.copytree(run_folder, folder)
    for path in (folder / "checkpoints").iterdir():
        if int(path.name[5:]) > step:
            shutil.rmtree(path)


def log_likelihoods(folder):
    """Return what lm-eval's own model says of pieces of text, in nats."""
    lm = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=8)
    texts = [
        line.strip()
        for line in Path(json.__file__).read_text().splitlines()
        if len(line.strip()) > 30
    ]
    requests = [
        Instance("loglikelihood", {}, (text[:10], text[10:30]), number)
        for number, text in enumerate(texts[:100])
    ]
    return [value for value, _ in lm.loglikelihood(requests)]


@pytest.mark.slow
def test_begun_by_two_copies_it_ends_in_four_pieces(prepared, unsharded, tmp_path, forked_reload):
    continue_elsewhere(unsharded, tmp_path / "run", step=3)
    flags = flags_of(prepared, tmp_path / "run", "--batch.micro_batch", "1")
    assert "4 processes, each on: CPU with 1 thread, fp32, FSDP2" in run(
        SHARDED, flags, processes=4
    )
    found = []
    for folder in (tmp_path / "run", unsharded):
        export_checkpoint(folder / "checkpoints" / "step-00000008", tmp_path / folder.parent.name)
        found.append(log_likelihoods(tmp_path / folder.parent.name))
    assert len(found[0]) == 100
    assert found[0] == pytest.approx(found[1], abs=1e-2)


@pytest.mark.slow
def test_begun_by_two_copies_it_ends_in_two_times_two_pieces(prepared, unsharded, tmp_path):
    continue_elsewhere(unsharded, tmp_path / "run", step=3)
    flags = flags_of(prepared, tmp_path / "run", "--batch.micro_batch", "1")
    said = run(SHARDED, flags, processes=4, SHARD_SIZE="2", FSDP_STATE_DICT_TYPE="FULL_STATE_DICT")
    assert "HSDP (2 replicas of 2 shards)" in said
    assert "resumed at step 3" in said
    assert_same_curve(tmp_path / "run", unsharded)
    # As asked for, one process has written all of it.
    path = tmp_path / "run" / "checkpoints" / "step-00000006"
    assert files_of(path) == files_of(unsharded / "checkpoints" / path.name)
    assert verify_checkpoint(path) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_killed_and_started_again_it_is_the_run_that_was_never_killed(prepared, tmp_path, kind):
    more = ["--schedule.tokens", "6144", "--checkpoint.every", "2", "--optimizer.kind", kind]
    whole, killed = (flags_of(prepared, tmp_path / name, *more) for name in ("whole", "killed"))
    run(SHARDED, whole)
    options = {"stderr": subprocess.DEVNULL, "variables": forked_launchers()}
    process = start(*command(SHARDED, killed), **options)
    wait_for_step(process, 9)
    for pid in processes_of(tmp_path / "killed"):
        os.kill(pid, signal.SIGKILL)
    process.stdout.read()
    process.wait(300)
    assert "resumed at step" in run(SHARDED, killed)
    assert read_rows(tmp_path / "killed") == read_rows(tmp_path / "whole")
    texts = [(tmp_path / name / "samples.jsonl").read_text() for name in ("killed", "whole")]
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_a_signal_saves_a_sharded_run(prepared, tmp_path):
    flags = flags_of(prepared, tmp_path / "run", "--schedule.tokens", "1e9")
    options = {"stderr": subprocess.DEVNULL, "variables": forked_launchers()}
    process = start(*command(SHARDED, flags), **options)
    wait_for_step(process, 5)
    process.send_signal(signal.SIGTERM)
    process.stdout.read()
    process.wait(300)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("resumable", "signal SIGTERM")
    path = tmp_path / "run" / "checkpoints" / f"step-{status['step']:08d}"
    assert verify_checkpoint(path) == []
    assert processes_of(tmp_path / "run") == []


LIMITED = """
import os, resource, runpy, sys
if os.environ["RANK"] == "1":
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_where_another_process_cannot_write_no_checkpoint_is_made_and_all_go_on(prepared, tmp_path):
    script = tmp_path / "limited.py"
    script.write_text(LIMITED)
    said = run([script, *SHARDED], flags_of(prepared, tmp_path / "run"), resumable=True)
    told = "the checkpoint could not be written: [Errno 27] File too large"
    assert said.count(told) == 3  # at steps 3, 6 and 8, by the first process
    assert "stopped at step 8 of 8, without a checkpoint" in " ".join(said.split())
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


MEMORY = """
import resource, psutil
import torch
from tests.fsdp_on_cpu import shard_on_cpus
from tests.distributed_worker import engine_module, recipe_of
from pretrain_lib import GPT2, GPT2Config
from pretrain_lib.training.placement import place
shard_on_cpus()
config = recipe_of(GPT2Config(vocabulary_size=512, num_layers=16, width=640, num_heads=10))
accelerator = engine_module.start_accelerator(config)
accelerator.reduce(torch.ones(1))  # what the first message takes is not the model's
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = psutil.Process().memory_info().rss
with torch.device("meta"):
    model = GPT2(config.model)
place(config, model, accelerator)
model.initialize(0)
size = 4 * sum(parameter.numel() for parameter in model.parameters())
print("grown by", (peak() - before) / size)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_a_model_without_weights_never_is_whole(tmp_path):
    """Of 300 MB each process holds half; made whole and cut, they would be 450 MB for a while."""
    (tmp_path / "memory.py").write_text(MEMORY)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    options = launcher_environment()
    del options["env"]["PYTHON_EXEC"]  # a fork would begin with the memory of all that is imported
    result = subprocess.run([*command, str(tmp_path / "memory.py")], **options, timeout=300)
    grown = re.findall(r"grown by (\S+)", result.stdout)
    assert len(grown) == 2, result.stderr
    assert all(0.5 <= float(share) < 1 for share in grown), grown


def test_sharding_that_would_not_happen_is_refused(recipe, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="fsdp_version=1 is not supported: set fsdp_version: 2"):
        start_accelerator(recipe)
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match="FSDP was requested but Accelerate runs NO without it"):
        start_accelerator(recipe)


@pytest.mark.parametrize(
    "setting", ["CPU_RAM_EFFICIENT_LOADING", "ACTIVATION_CHECKPOINTING", "OFFLOAD_PARAMS"]
)
def test_settings_that_would_change_the_run_are_refused(monkeypatch, setting):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv(f"FSDP_{setting}", "true")
    with pytest.raises(ValueError, match=f"fsdp_{setting.lower()}=true"):
        build_sharding(param_dtype="fp32")


def test_gradients_are_reduced_and_weights_sent_in_fp32_unless_asked(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    for dtype, sent in (("fp32", None), ("bf16", torch.bfloat16)):
        policy = build_sharding(param_dtype=dtype).mixed_precision_policy
        assert (policy.param_dtype, policy.reduce_dtype) == (sent, torch.float32)


def test_parts_of_matrices_are_refused():
    accelerator = Accelerator(cpu=True)
    accelerator.state.parallelism_config = type("Parallel", (), {"non_data_parallel_size": 2})
    with pytest.raises(ValueError, match="set only dp_replicate_size and dp_shard_size"):
        check_sharding(accelerator, param_dtype="fp32")


def test_weights_sent_in_bf16_where_none_are_sent_are_refused(recipe):
    message = "system.fsdp_param_dtype=bf16 needs FSDP2 with mixed_precision: bf16"
    with pytest.raises(ValueError, match=message):
        start_accelerator(change(recipe, system={"fsdp_param_dtype": "bf16"}))


def test_another_accumulation_than_the_batch_is_refused(recipe, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8")
    with pytest.raises(ValueError, match=r"batch.tokens=256 makes 4 micro-batches on 1 process:"):
        start_accelerator(recipe)
    start_accelerator(change(recipe, batch={"micro_batch": 1}))


def test_the_token_read_around_an_evaluation_draws_no_random_number():
    model = GPT2(replace(SMALL["gpt2"], dropout=0.5)).initialize(0).train()
    before = torch.get_rng_state()
    _read_one_token(model, Accelerator(cpu=True))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
