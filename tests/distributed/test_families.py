"""Families of transformers under FSDP2: the run of one process; and a recipe on other numbers."""

import json
import os
import signal
import subprocess

import pytest
import torch
from transformers import AutoModelForCausalLM

from pretrain_lib import CausalLMConfig, build_model, load_pretrained, save_pretrained
from tests.conftest import forked_launchers, read_rows
from tests.distributed.test_distributed import work
from tests.distributed.test_sharding import (
    assert_same_curve,
    command,
    continue_elsewhere,
    processes_of,
    run,
    start,
    wait_for_step,
)
from tests.distributed_worker import FAMILY_STEPS
from tests.families import FAMILIES, WITH_BUFFERS

pytestmark = pytest.mark.slow

# What the machine does otherwise, and must not change the run of a family.
OPTIONS = ("hf.qwen3-fsdp-no-full", "hf.granite-fsdp-no-selective", "hf.olmo2-fsdp-no-compile")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return a function that reads what a case came to on one process or two."""
    folders = {processes: tmp_path_factory.mktemp(f"world-{processes}") for processes in (1, 2)}
    work(folders[1], 1, [f"hf.{name}-ddp-no" for name in FAMILIES])
    work(folders[2], 2, [*(f"hf.{name}-fsdp-no" for name in FAMILIES), *OPTIONS])
    return lambda case, processes: json.loads((folders[processes] / f"{case}.json").read_text())


@pytest.mark.parametrize("name", FAMILIES)
def test_fsdp2_is_the_run_of_one_process(results, name):
    one, two = results(f"hf.{name}-ddp-no", 1), results(f"hf.{name}-fsdp-no", 2)
    assert len(two["losses"]) == FAMILY_STEPS
    assert two["pieces"] > 0
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert two["norms"] == pytest.approx(one["norms"], abs=1e-4)
    # The blocks, and what lies outside of them, each once.
    assert two["collectives"]["reduce_scatter"] == 3


@pytest.mark.parametrize("case", OPTIONS)
def test_recomputation_and_compilation_change_nothing(results, case):
    name = case.split("-")[0]
    one, other = results(f"{name}-ddp-no", 1), results(case, 2)
    assert other["losses"] == pytest.approx(one["losses"], abs=1e-5)


def flags_of(prepared, folder, *more):
    """Return the flags that shrink the recipe to a small Qwen3 and a few steps."""
    return [
        *("--model.config", json.dumps(FAMILIES["qwen3"])),
        *("--data.path", str(prepared), "--run.dir", str(folder)),
        *("--batch.tokens", "256", "--batch.micro_batch", "2", "--batch.sequence_length", "32"),
        *("--schedule.tokens", "2048", "--schedule.warmup_tokens", "512"),
        *("--validation.every", "4", "--validation.tokens", "512", "--data.document_masking"),
        *("true", "--samples.prompts", "[def ]", "--samples.tokens", "8", "--samples.every", "4"),
        *("--checkpoint.every", "3", "--checkpoint.keep_last", "0", "--scores.tasks", "[]"),
        *more,
    ]


RECIPE = "recipes/causal_lm.py"
IN_PIECES = ["tests/fsdp_on_cpu.py", RECIPE]


@pytest.fixture(scope="module")
def begun(prepared, tmp_path_factory):
    """A run of two processes under DDP."""
    folder = tmp_path_factory.mktemp("families") / "run"
    run([RECIPE], flags_of(prepared, folder))
    return folder


def test_begun_under_ddp_with_two_processes_it_ends_under_fsdp2_with_four(
    prepared, begun, tmp_path
):
    continue_elsewhere(begun, tmp_path / "run", step=3)
    flags = flags_of(prepared, tmp_path / "run", "--batch.micro_batch", "1")
    said = run(IN_PIECES, flags, processes=4)
    assert "4 processes, each on: CPU with 1 thread, fp32, FSDP2" in said
    assert "resumed at step 3" in said
    assert_same_curve(tmp_path / "run", begun)
    ends = [folder / "checkpoints" / "step-00000008" for folder in (tmp_path / "run", begun)]
    assert len(list(ends[0].glob("model-*-of-00004.safetensors"))) == 4
    ids = torch.arange(64).view(2, 32)
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(end).eval()(ids).logits for end in ends]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)


def test_killed_by_sigkill_and_resumed_it_is_bit_equal(prepared, tmp_path):
    more = ["--schedule.tokens", "5120", "--checkpoint.every", "2"]
    whole, killed = (flags_of(prepared, tmp_path / name, *more) for name in ("whole", "killed"))
    run(IN_PIECES, whole)
    options = {"stderr": subprocess.DEVNULL, "variables": forked_launchers()}
    process = start(*command(IN_PIECES, killed), **options)
    wait_for_step(process, 7)
    for pid in processes_of(tmp_path / "killed"):
        os.kill(pid, signal.SIGKILL)
    process.stdout.read()
    process.wait(300)
    assert "resumed at step" in run(IN_PIECES, killed)
    assert read_rows(tmp_path / "killed") == read_rows(tmp_path / "whole")
    ends = [tmp_path / name / "checkpoints" / "step-00000020" for name in ("killed", "whole")]
    files = [sorted(end.glob("*.safetensors")) for end in ends]
    assert len(files[0]) == 2
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]


def test_saved_buffers_are_kept_under_fsdp2(prepared, tmp_path):
    fields = WITH_BUFFERS["deepseek_v3"] | {"vocab_size": 512}
    model = build_model(CausalLMConfig(config=fields)).initialize(0)
    bias = "model.model.layers.1.mlp.gate.e_score_correction_bias"
    model.state_dict()[bias].copy_(torch.arange(8) / 7)
    save_pretrained(model, tmp_path / "initial", tokenizer=None)
    flags = flags_of(prepared, tmp_path / "run", "--model.config", json.dumps(fields))
    flags += [
        "--run.initial_weights",
        str(tmp_path / "initial"),
        "--data.document_masking",
        "false",
    ]
    for steps in ("3", "6"):
        run(IN_PIECES, [*flags, "--run.max_steps", steps])
        end = tmp_path / "run" / "checkpoints" / f"step-0000000{steps}"
        assert len(list(end.glob("model-*.safetensors"))) == 2
        assert torch.equal(load_pretrained(end).state_dict()[bias], torch.arange(8) / 7)
