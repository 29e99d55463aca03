"""What a plan says, against figures by hand, and what it warns of."""

import math
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch

from pretrain_lib import GPT2, open_corpus, start_accelerator, train
from pretrain_lib.checkpoint.folders import prune, remove_leftovers
from pretrain_lib.config.arguments import parse_recipe
from pretrain_lib.data.tokens.shards import read_manifest
from pretrain_lib.models.any_model import build_model
from pretrain_lib.models.flops import MEMORY_GB, PEAK_TFLOPS, Hardware
from pretrain_lib.plan.disk import most_checkpoints
from pretrain_lib.plan.micro_batch import Planned
from pretrain_lib.plan.network import World
from pretrain_lib.plan.plan import documents_per_token, format_plan
from tests.conftest import ROOT, change, run_recipe_script

sys.path.insert(0, str(ROOT / "recipes"))
import gpt2_124m  # noqa: E402
import llama_1_3b  # noqa: E402
import presets  # noqa: E402


def plan(recipe, hardware=None, **sections):
    """Return the facts of a plan by name, its rows by devices and sharding, and its warnings."""
    lines = format_plan(change(recipe, **sections), hardware or Hardware()).splitlines()
    facts = {line[:17].strip(): line[17:] for line in lines[: lines.index("")]}
    cells = (line.split() for line in lines if line[:7].strip().replace(",", "").isdigit())
    rows = {f"{row[0]} {' '.join(row[1:-11])}": row[-11:] for row in cells}
    warnings = [line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")]
    return facts, rows, warnings


def test_a_run_says_what_its_step_takes_of_the_gpu_and_what_would_fit():
    """By hand: GPT-2 124M takes 9.64 GB with 16 sequences, LLaMA 1.3B 36.9 GB with 4 (above)."""

    def line(recipe, memory_gb):
        with torch.device("meta"):
            model = build_model(recipe.model)
        return Planned(recipe).memory_line(model, World(), memory_gb)

    assert line(gpt2_124m.RECIPE, 12) == "about 9.64 of 12 GB of each device"
    shown = line(gpt2_124m.RECIPE, 141)
    assert shown.startswith("about 9.64 of 141 GB of each device; --batch.micro_batch 256 fits too")
    shown = line(gpt2_124m.RECIPE, 8)
    assert shown.endswith("of 8 GB of each device, which may not fit; --batch.micro_batch 8 does")
    assert ", which may not fit, as no micro-batch does: " in line(llama_1_3b.RECIPE, 16)


def test_gpt2_124m_on_one_node_and_on_four():
    facts, rows, warnings = plan(gpt2_124m.RECIPE)
    assert facts["parameters"] == "124,439,808"
    assert facts["tokens per step"] == "524,288"
    assert facts["steps"] == "19,073, warm-up 715"
    # 6 x (124,439,808 - 1,024 x 768) + 12 x 12 x 768 x 1,024 a token, 19,073 x 524,288 tokens
    assert facts["FLOPs"] == "8.55e+18; per token 855.2M (6N + 12LdT), 741.9M (6N)"
    # 12 bytes x 124,439,808 each; every 5,000 steps and at the end, the last three kept
    assert facts["disk"].startswith("5.97 GB: checkpoints of 1.49 GB, 3 ")
    assert facts["activations"].startswith("none 5.67, selective 3.68, full 0.65 GB")
    assert facts["head and loss"].startswith("1.98 GB")
    assert list(rows) == ["1 none", "8 DDP", "8 FSDP2", "32 DDP", "32 FSDP2", "32 HSDP 4 x 8"]
    # 524,288 = 32 x 16 x 1,024; 4, 4 and 8 bytes a parameter of 124,475,904 with the padding;
    # activations and loss on top; 8.55e18 / (0.4 x 989e12) seconds
    state = ["0.50", "0.50", "1.00"]
    peaks = ["9.64", "7.66", "4.63"]
    assert rows["1 none"] == ["32", *state, "-", *peaks, "-", "6h00m", "128"]
    # buckets of 4 bytes a parameter; an all-reduce sends 2 x 7/8 x 0.498 GB
    peaks = ["10.1", "8.15", "5.12"]
    assert rows["8 DDP"] == ["4", *state, "0.50", *peaks, "0.87", "45m02s", "64"]
    # 7/8 x (4 x 4 bytes x (2 x 12 layers + the rest) + 0.498 GB)
    assert rows["8 FSDP2"][:5] == ["4", "0.06", "0.50", "0.12", "0.21"]
    assert rows["8 FSDP2"][-3:] == ["3.37", "45m02s", "64"]
    assert rows["32 FSDP2"][:5] == ["1", "0.02", "0.02", "0.03", "0.21"]
    assert rows["32 HSDP 4 x 8"][:5] == ["1", "0.06", "0.06", "0.12", "0.21"]
    assert warnings == []


def test_muon_keeps_one_moment_of_the_matrices_and_is_counted():
    facts, rows, _ = plan(gpt2_124m.RECIPE, optimizer={"kind": "muon"})
    # 12 layers x 5 x (4 x 6 x 768^3 + 2 x (4 x 4 + 2) x 768^3) of 855.2M x 524,288 and themselves
    assert facts["Muon"].startswith("1.63e+12 FLOPs a step, 0.4% of all")
    # 8 bytes x 124,475,904, less 4 bytes x 12 x 7,077,888
    assert rows["1 none"][3] == "0.66"
    assert "checkpoints of 1.15 GB" in facts["disk"]


def test_llama_1_3b_on_24_devices_where_its_batch_does_not_divide():
    hardware = Hardware("A100", mfu=0.5)
    facts, rows, warnings = plan(llama_1_3b.RECIPE, hardware, system={"processes": 24})
    # 6 x (1,266,780,160 - 8,192 x 2,048) + 12 x 24 x 2,048 x 2,048 a token, 85,830 x 524,288 tokens
    assert facts["FLOPs"] == "3.92e+20; per token 8.708B (6N + 12LdT), 7.5B (6N)"
    assert facts["activations"].startswith("none 16.5, selective 11.0, full 1.68 GB")
    assert list(rows) == ["24 DDP", "24 FSDP2", "24 HSDP 3 x 8"]
    # 3.92e20 / (24 x 0.5 x 312e12) = 104,700 seconds
    assert rows["24 DDP"][:5] == ["3", "5.07", "5.07", "10.1", "5.07"]
    assert rows["24 DDP"][-3:] == ["9.71", "1d05h", "-"]  # no power of two divides the step
    (warning,) = warnings
    assert "batch.tokens=524288 must be a multiple of 24 processes x 4 sequences" in warning
    assert "nearest: 589824" in warning  # 3 x 196,608


def test_memory_that_does_not_fit_is_marked_and_warned_of():
    small = Hardware("L4", node=4)
    _, rows, warnings = plan(llama_1_3b.RECIPE, small, system={"processes": 4})
    assert [cell.endswith("!") for cell in rows["4 DDP"][5:8]] == [True, True, True]
    assert [cell.endswith("!") for cell in rows["4 FSDP2"][5:8]] == [True, False, False]
    (warning,) = warnings
    assert (
        "system.activation_checkpointing=none" in warning
        and "24 GB of L4 on 4 (DDP), 4 (FSDP2)" in warning
    )
    _, _, warnings = plan(
        llama_1_3b.RECIPE, small, system={"processes": 4, "activation_checkpointing": "selective"}
    )
    assert "24 GB of L4 on 4 (DDP):" in warnings[0]
    halved = {"optimizer": {"moments": "bf16"}, "batch": {"micro_batch": 1}}
    _, rows, warnings = plan(llama_1_3b.RECIPE, Hardware("H100"), **halved)
    assert warnings == [] and not any("!" in cell for row in rows.values() for cell in row)


@pytest.mark.parametrize("recipe", [gpt2_124m.RECIPE, llama_1_3b.RECIPE], ids=["gpt2", "llama"])
@pytest.mark.parametrize("kind", ["none", "full"])
@pytest.mark.parametrize("device", ["RTX 4090", "H100", "H200"])
def test_the_micro_batch_that_is_named_is_the_largest_that_fits(recipe, kind, device):
    system, hardware = {"processes": 8, "activation_checkpointing": kind}, Hardware(device)
    column = {"none": 5, "full": 7}[kind]

    def filled(sharding, sequences):
        changed = {"system": system, "batch": {"micro_batch": sequences}}
        peak = plan(recipe, hardware, **changed)[1][sharding][column]
        return float(peak.rstrip("!")) / MEMORY_GB[device]

    whole_step = recipe.batch.tokens // recipe.batch.sequence_length // 8
    for sharding, row in plan(recipe, hardware, system=system)[1].items():
        largest = 0 if row[-1] == "-" else int(row[-1])
        assert largest == 0 or filled(sharding, largest) <= 0.9
        assert largest == whole_step or filled(sharding, max(1, 2 * largest)) > 0.9


def test_it_says_compiled_or_eager_and_counts_packed_documents(recipe, prepared):
    assert plan(recipe)[0]["activations"].endswith("in bf16, compiled")
    assert plan(recipe, system={"compile": False})[0]["activations"].endswith("in bf16, eager")
    split = read_manifest(prepared)["splits"]["train"]
    planned = Planned(recipe, documents_per_token(change(recipe, data={"document_masking": True})))
    documents = planned.step(World(), sequences=64).documents
    # Each window begins inside a document.
    assert documents == math.ceil(64 + 64 * 32 * split["documents"] / split["tokens"])
    assert documents_per_token(recipe) == 0


def test_data_that_is_read_more_than_once_is_warned_of(recipe, prepared):
    tokens = read_manifest(prepared)["splits"]["train"]["tokens"]
    assert plan(recipe)[2] == []
    planned = 3 * tokens // 256 * 256
    (warning,) = plan(recipe, schedule={"tokens": planned})[2]
    assert f"data.path={prepared} holds {tokens:,} tokens" in warning
    assert warning.endswith(f"reads them {planned / tokens:.2f} times")
    paths = [str(prepared), str(prepared)]
    twice = plan(
        recipe, schedule={"tokens": planned}, data={"path": paths, "weights": [0.75, 0.25]}
    )
    assert [warning.split()[-2] for warning in twice[2]] == ["2.25"]
    nowhere = plan(recipe, schedule={"tokens": planned}, data={"path": "not/there"})
    assert nowhere[2] == []


@pytest.mark.parametrize(
    ("checkpoint", "expected"),  # of those at steps 5,000, 10,000, 15,000, and at the end
    [
        ({"keep_last": 0}, "4 (checkpoint.keep_last)"),
        ({"keep_last": 8}, "4 (checkpoint.keep_last)"),
        ({"every": None}, "1 (checkpoint.keep_last)"),
        ({}, "3 (checkpoint.keep_last) and one more while saving"),
        (
            {"keep_last": 2, "keep_every": 5000},
            "2 (checkpoint.keep_last), 1 (checkpoint.keep_every) and one more while saving",
        ),
        (
            {"keep_last": 2, "keep_best": "loss"},
            "2 (checkpoint.keep_last), 1 (checkpoint.keep_best) and one more while saving",
        ),
        (
            {"every": None, "every_tokens": 10**9, "keep_last": 8},
            "8 (checkpoint.keep_last) and one more while saving",
        ),
    ],
)
def test_checkpoints_on_disk_are_counted(checkpoint, expected):
    facts, _, _ = plan(gpt2_124m.RECIPE, checkpoint=checkpoint)
    assert facts["disk"].endswith(f" GB: checkpoints of 1.49 GB, {expected}")


def most_at_once(config, folder, improved):
    """Return the most checkpoints that a run has at once; validations at `improved` are best."""
    best, most, tokens = 0, 0, 0
    for step in range(1, config.whole_run() + 1):
        tokens += config.batch_sizes().at(step - 1) * config.batch.sequence_length
        best = step if step in improved else best
        if step in (best, config.whole_run()) or config.save_is_due(step, tokens):
            (newest := folder / f"step-{step:08d}").mkdir(parents=True)
            most = max(most, len(list(folder.glob("step-*"))))
            keep = {name: getattr(config.checkpoint, name) for name in ("keep_last", "keep_every")}
            prune(folder, newest, **keep, steps={best})
            remove_leftovers(folder)
    return most


@pytest.mark.parametrize("keep_last", [0, 1, 2, 9])
@pytest.mark.parametrize("keep_every", [None, 2, 6])
@pytest.mark.parametrize("intervals", [{"every": 3}, {"every": None}, {"every_tokens": 600}])
def test_the_checkpoints_on_disk_are_those_that_pruning_leaves(
    recipe, tmp_path, keep_last, keep_every, intervals
):
    kept = {"keep_last": keep_last, "keep_every": keep_every, **intervals}
    ramp = {"ramp_from": 128, "ramp_increment": 64, "ramp_tokens": 512}
    config = change(recipe, checkpoint=kept, schedule={"tokens": 3400}, batch=ramp)
    expected = most_at_once(config, tmp_path / "plain", ())
    assert sum(most_checkpoints(config).values()) == expected

    config = change(config, checkpoint={"keep_best": "loss"}, validation={"every": 4})
    validated = [step for step in range(1, config.whole_run()) if step % 4 == 0]
    patterns = [c for n in range(len(validated) + 1) for c in combinations(validated, n)]
    expected = max(
        most_at_once(config, tmp_path / str(number), improved)
        for number, improved in enumerate(patterns)
    )
    found = sum(most_checkpoints(config).values())
    # One more where the best is the newest as well, in every order of losses.
    assert found in (expected, expected + (0 < keep_last < 9))


@pytest.mark.moderate
def test_a_run_has_as_many_checkpoints_as_its_plan_says(recipe):
    checkpoint = {"every": 1, "keep_last": 2, "keep_every": 3}
    config = change(recipe, checkpoint=checkpoint, samples={"prompts": []})
    train(config, GPT2(config.model).initialize(0), open_corpus(config), start_accelerator(config))
    left = [int(path.name[5:]) for path in Path(config.run.dir, "checkpoints").iterdir()]
    assert sorted(left) == [3, 6, 7, 8]
    counts = most_checkpoints(config)  # while 8 is saved: 3, 6, 7, and 8
    assert counts == {"checkpoint.keep_last": 2, "checkpoint.keep_every": 1, "being saved": 1}


def test_every_size_has_a_plan():
    for name in presets.SIZES:
        flags = ["--preset", name, "--plan", "B200", "--plan_node", "72", "--plan_mfu", "0.35"]
        recipe, hardware = parse_recipe(
            gpt2_124m.RECIPE, presets=presets.GPT2_PRESETS, arguments=flags
        )
        assert hardware == Hardware("B200", mfu=0.35, node=72)
        text = format_plan(replace(recipe), hardware)
        assert max(map(len, text.splitlines()[: text.count("\n") - 1])) <= 110


def test_the_flags_of_a_plan():
    assert parse_recipe(gpt2_124m.RECIPE, arguments=[])[1] is None
    assert parse_recipe(gpt2_124m.RECIPE, arguments=["--plan"])[1] == Hardware()
    with pytest.raises(ValueError, match="--plan_mfu 40 must be a number above 0 and at most 1"):
        parse_recipe(gpt2_124m.RECIPE, arguments=["--plan", "--plan_mfu", "40"])
    with pytest.raises(ValueError, match="--plan_node 0 must be a whole number of at least 1"):
        parse_recipe(gpt2_124m.RECIPE, arguments=["--plan", "--plan_node", "0"])
    refused = run_recipe_script("--plan", "H10")
    assert refused.returncode == 2 and "'H100 NVL'" in refused.stderr
    assert PEAK_TFLOPS.keys() == MEMORY_GB.keys()


def test_other_bad_settings_are_refused_as_in_a_run():
    with pytest.raises(ValueError, match="less than one step"):
        plan(gpt2_124m.RECIPE, schedule={"tokens": 1000, "warmup_tokens": 0})
    with pytest.raises(ValueError, match="batch.micro_batch=0"):
        plan(gpt2_124m.RECIPE, batch={"micro_batch": 0})
