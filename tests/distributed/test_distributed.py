"""Processes and sharding do not change the run: DDP, FSDP2 and HSDP against one process."""

import json
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import launcher_environment
from tests.distributed_worker import (
    LENGTH,
    MICRO_BATCHES,
    MODELS,
    STEPS,
    TIMEOUT_SECONDS,
    VOCABULARY,
)
from tests.forks import forked_python

FAMILIES = ("gpt2", "llama", "qwen3")
WAYS = {2: ("ddp", "fsdp"), 4: ("ddp", "fsdp")}
# With Muon, by the number of processes.
MUON = {
    1: [f"{model}-ddp-no-muon" for model in ("gpt2", "qwen3", "narrow")],
    2: ["gpt2-ddp-no-muon", "gpt2-fsdp-no-muon", "qwen3-fsdp-no-muon"],
    3: ["narrow-fsdp-no-muon", "gpt2-fsdp-no-muon", "gpt2-ddp-no-muon"],
    4: ["gpt2-ddp-no-muon", "gpt2-hsdp-no-muon", "narrow-hsdp-no-muon"],
}
OPTIONS = {
    "gpt2-fsdp-no-full": "gpt2-ddp-no",
    "gpt2-fsdp-no-selective": "gpt2-ddp-no",
    "gpt2-fsdp-no-compile-full": "gpt2-ddp-no",
    "gpt2-fsdp-no-share": "gpt2-ddp-no",
    "gpt2-ddp-no-share": "gpt2-ddp-no",
}


def work(out, processes, cases):
    command = [forked_python(), "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    command += ["tests/distributed_worker.py", str(out), *cases]
    result = subprocess.run(command, **launcher_environment(), timeout=400)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return a function that reads what a case came to on so many processes."""
    folders = {}
    for processes in (1, 2, 3, 4):
        out = folders[processes] = tmp_path_factory.mktemp(f"world-{processes}")
        ways = WAYS.get(processes, ("ddp",) if processes == 1 else ())
        cases = [f"{m}-{way}-{p}" for m in FAMILIES for way in ways for p in ("no", "bf16")]
        cases += MUON[processes]
        if processes == 2:
            cases += [*OPTIONS, "gpt2-fsdp-bf16-gather", "gpt2-fsdp-no-moments"]
        if processes == 1:
            cases += ["gpt2-ddp-no-moments"]
        work(out, processes, cases)

    def read(case, processes):
        folder = folders[processes]
        record = json.loads((folder / f"{case}.json").read_text())
        return record | {"weights": load_file(folder / f"{case}.safetensors")}

    return read


def logits_of(model, weights):
    module = MODELS[model]()
    module.load_state_dict(weights)
    ids = torch.randint(VOCABULARY, (4, LENGTH), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return module(ids)


def without_key_bias(weights):
    """Leave out what has no gradient but rounding, which Adam amplifies: GPT-2's key biases."""
    kept = {name: tensor.clone() for name, tensor in weights.items()}
    for name, tensor in kept.items():
        if name.endswith("attn.c_attn.bias"):
            tensor[len(tensor) // 3 : len(tensor) // 3 * 2] = 0
    return kept


@pytest.mark.slow
@pytest.mark.parametrize("processes", WAYS)
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("model", FAMILIES)
def test_any_number_of_processes_is_the_run_of_one(results, model, way, processes):
    one, many = results(f"{model}-ddp-no", 1), results(f"{model}-{way}-no", processes)
    assert len(many["losses"]) == STEPS
    assert many["pieces"] == (len(many["weights"]) if way == "fsdp" else 0)
    assert many["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert many["norms"] == pytest.approx(one["norms"], abs=1e-5)
    expected, found = without_key_bias(one["weights"]), without_key_bias(many["weights"])
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("processes", WAYS)
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("model", FAMILIES)
def test_in_bf16_as_well(results, model, way, processes):
    one, many = results(f"{model}-ddp-bf16", 1), results(f"{model}-{way}-bf16", processes)
    assert many["losses"] == pytest.approx(one["losses"], abs=1e-3)
    expected, found = (logits_of(model, r["weights"]) for r in (one, many))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("case", OPTIONS)
def test_recomputation_compilation_and_other_beginnings_change_nothing(results, case):
    plain, other = results(OPTIONS[case], 1), results(case, 2)
    assert other["losses"] == pytest.approx(plain["losses"], abs=1e-5)
    assert other["norms"] == pytest.approx(plain["norms"], abs=1e-5)


@pytest.mark.slow
def test_moments_in_bf16_are_those_of_one_process(results):
    one, two = results("gpt2-ddp-no-moments", 1), results("gpt2-fsdp-no-moments", 2)
    # What one process rounds up, another may round down.
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-4)


@pytest.mark.slow
def test_weights_sent_in_bf16_stay_near(results):
    plain, low = results("gpt2-ddp-bf16", 1), results("gpt2-fsdp-bf16-gather", 2)
    assert low["losses"] == pytest.approx(plain["losses"], abs=2e-3)
    assert low["losses"] != results("gpt2-fsdp-bf16", 2)["losses"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", WAYS)
def test_ddp_speaks_once_a_step(results, processes):
    # Targets are counted, gradients averaged (here in one bucket), losses summed.
    counted = results("gpt2-ddp-no", processes)["collectives"]
    assert counted == {"all_reduce": 3}


@pytest.mark.slow
@pytest.mark.parametrize("processes", WAYS)
@pytest.mark.parametrize("case", ["gpt2-fsdp-no", "llama-fsdp-bf16", "qwen3-fsdp-no"])
def test_fsdp_sends_gradients_once_a_step(results, case, processes):
    layers, micro_batches = 2, MICRO_BATCHES // processes
    counted = results(case, processes)["collectives"]
    assert counted["reduce_scatter"] == layers + 1  # and what lies outside of them
    # In forward all, in backward the layers again: the outermost stays.
    assert counted["all_gather"] == micro_batches * (2 * layers + 1)
    assert counted["all_reduce"] == 3  # targets, gradient norm, losses


@pytest.mark.slow
def test_recomputation_gathers_nothing_again(results):
    plain = results("gpt2-fsdp-no", 2)["collectives"]
    for way in ("full", "selective"):
        assert results(f"gpt2-fsdp-no-{way}", 2)["collectives"] == plain


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "processes"), [(case, n) for n, cases in MUON.items() if n > 1 for case in cases]
)
def test_muon_is_that_of_one_process(results, case, processes):
    one, many = results(f"{case.split('-')[0]}-ddp-no-muon", 1), results(case, processes)
    assert many["losses"] == pytest.approx(one["losses"], abs=1e-5)
    expected, found = without_key_bias(one["weights"]), without_key_bias(many["weights"])
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=2e-5, rtol=0)
    assert one["losses"][-1] != results("gpt2-ddp-no", 1)["losses"][-1]


@pytest.mark.slow
def test_muon_sends_the_matrices_of_each_shape_once_a_step(results):
    shapes = 4  # of the matrices in a layer of GPT-2
    for processes in (2, 3, 4):
        counted = results("gpt2-ddp-no-muon", processes)["collectives"]
        assert counted == {"all_reduce": 3, "all_gather": shapes}
    for case, processes in (("gpt2-fsdp-no-muon", 2), ("gpt2-fsdp-no-muon", 3)):
        counted = results(case, processes)["collectives"]
        assert counted["all_to_all"] == 2 * shapes  # to an owner, and back
        assert counted["reduce_scatter"] == 3
    assert results("gpt2-hsdp-no-muon", 4)["collectives"]["all_to_all"] == 2 * shapes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "processes", "groups"),
    [("gpt2-ddp-no", 2, 1), ("gpt2-fsdp-no", 4, 1), ("gpt2-hsdp-no-muon", 4, 3)],
)
def test_every_group_waits_as_long_as_the_recipe_says(results, case, processes, groups):
    assert results(case, processes)["timeouts"] == [TIMEOUT_SECONDS] * groups
