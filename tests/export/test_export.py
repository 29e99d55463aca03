"""Exports as other programs read them: transformers 4.57, and lm-eval without a network."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

from pretrain_lib.data.text.tokenizer import load_tokenizer
from pretrain_lib.evaluate.harness import evaluate_folder
from pretrain_lib.export.check import write_expected
from pretrain_lib.export.export import export_checkpoint
from pretrain_lib.models.any_model import build_model, load_pretrained, save_pretrained
from pretrain_lib.models.gpt2 import GPT2Config
from pretrain_lib.models.llama import LlamaConfig
from pretrain_lib.models.rope import RopeScaling
from tests.conftest import reloading_in_forks, run_command, write_text_and_tasks

SHAPE = {"vocabulary_size": 400, "context_length": 128, "num_layers": 2, "num_heads": 4}
GROUPED = SHAPE | {"width": 64, "num_key_value_heads": 2, "mlp_width": 96}
CONFIGS = {
    "gpt2": GPT2Config(**SHAPE, width=64),
    "untied llama": LlamaConfig(
        **GROUPED, rope_theta=500.0, rope_scaling=RopeScaling("llama3", 8.0, 32)
    ),
    "tied llama": LlamaConfig(**GROUPED, rope_theta=500.0, norm_epsilon=1e-6, tied_head=True),
    "linear llama": LlamaConfig(**GROUPED, rope_scaling=RopeScaling("linear", 4.0)),
    "yarn llama": LlamaConfig(
        **GROUPED, rope_scaling=RopeScaling("yarn", 4.0, 32, beta_fast=8.0, attention_factor=1.2)
    ),
    "qwen3": LlamaConfig(**GROUPED, head_width=24, qk_norm=True, tied_head=True),
}
READ = """
import json, sys
from pathlib import Path
from pretrain_lib.export.reload import find_problems
folders = [Path(sys.argv[1]) / name for name in sys.argv[2:]]
print(json.dumps([find_problems(folder, folder / "expected") for folder in folders]))
"""
# What 4.57 makes of configurations of its own: a folder of each, with logits of ids.
WRITE = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
llama = dict(vocab_size=61, hidden_size=64, intermediate_size=80, num_hidden_layers=2)
llama |= dict(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128)
llama3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)
configs = {
    "gpt2": GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=2, n_positions=128),
    "plain": LlamaConfig(**llama, rope_theta=500.0, tie_word_embeddings=True),
    "linear": LlamaConfig(**llama, rope_scaling={"type": "linear", "factor": 4.0}),
    "llama3": LlamaConfig(
        **llama, rope_theta=5e3, rope_scaling=llama3 | {"original_max_position_embeddings": 32}
    ),
    "yarn": LlamaConfig(**llama, rope_scaling={"rope_type": "yarn", "factor": 4.0}),
}
for name, config in configs.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
        ids = torch.randint(61, (2, 128))
        save_file({"ids": ids, "logits": model(ids).logits}, f"{sys.argv[1]}/{name}.safetensors")
    model.save_pretrained(f"{sys.argv[1]}/{name}")
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with prepared `data`, `tasks` from it, and a `model` of each configuration."""
    folder = tmp_path_factory.mktemp("export")
    tokenizer = write_text_and_tasks(folder, items=8)
    for name, config in CONFIGS.items():
        model = build_model(config).initialize(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3)  # or all endings would be nearly as likely
        save_pretrained(model, folder / name, tokenizer=tokenizer)
    return folder


@pytest.mark.slow
def test_transformers_4_reads_the_same(workplace, other, tmp_path):
    """Without `rope_theta` it takes 10,000, where 5 takes the right one: so this test can fail."""
    names = [*CONFIGS, "without rope_theta"]
    for name in names:
        source = workplace / (name if name in CONFIGS else "tied llama")
        shutil.copytree(source, tmp_path / name)
        (tmp_path / name / "expected").mkdir()
        options = {"tokenizer": load_tokenizer(source), "dtype": torch.float32}
        write_expected(load_pretrained(source), tmp_path / name / "expected", **options)
    path = tmp_path / names[-1] / "config.json"
    config = json.loads(path.read_text())
    del config["rope_theta"]
    path.write_text(json.dumps(config))
    done = run_command(sys.executable, "-c", READ, tmp_path, *names, environment=other)
    assert done.returncode == 0, done.stderr
    *found, (faults, _) = json.loads(done.stdout.splitlines()[-1])
    assert [problems for problems, _ in found] == [[]] * len(CONFIGS)
    assert max(difference for _, difference in found) < 1e-5
    assert "rope_theta is missing" in faults[0] and "logits under transformers differ" in faults[1]


@pytest.mark.slow
def test_folders_that_transformers_4_wrote_are_read_with_its_logits(other, tmp_path):
    written = run_command(sys.executable, "-c", WRITE, tmp_path, environment=other)
    assert written.returncode == 0, written.stderr
    for name in ("gpt2", "plain", "linear", "llama3", "yarn"):
        expected, model = (
            load_file(tmp_path / f"{name}.safetensors"),
            load_pretrained(tmp_path / name),
        )
        with torch.no_grad():
            logits = model.eval()(expected["ids"])
        scale = float(expected["logits"].abs().max())
        assert float((logits - expected["logits"]).abs().max()) < 1e-5 * scale, name


@pytest.mark.slow
def test_several_files_become_one_and_one_several(workplace, tmp_path, forked_reload):
    folder, out = workplace / "untied llama", tmp_path / "out"
    export_checkpoint(folder, out, max_shard_bytes=50_000)
    assert len(list(out.glob("model-*.safetensors"))) > 3
    export_checkpoint(out, tmp_path / "one")
    export_checkpoint(tmp_path / "one", out)  # replaced, no file is left over
    names = {path.name for path in folder.iterdir()} | {"README.md"}
    assert {path.name for path in out.iterdir()} == names
    assert load_pretrained(out).config == load_pretrained(folder).config
    stored, found = (load_file(f / "model.safetensors") for f in (folder, out))
    assert stored.keys() == found.keys()
    assert all(torch.equal(stored[key], found[key]) for key in stored)


# Twice the command `lm_eval` in one process, which imports it once.
TWICE = """
import sys
from lm_eval.__main__ import cli_evaluate
folder, *flags = sys.argv[1:]
for name in ("gpt2", "untied llama"):
    given = ["--model_args", f"pretrained={folder}/{name},dtype=float32"]
    sys.argv = ["lm_eval", "run", "--output_path", f"{folder}/{name}-scores", *given, *flags]
    cli_evaluate()
"""
TASKS = ("heldout_choice", "heldout_perplexity")


@pytest.fixture(scope="module")
def scored_alone(workplace, tmp_path_factory):
    """Exports, and what plain lm-eval scores them where there is no network, `lo` apart."""
    folder = tmp_path_factory.mktemp("alone")
    with reloading_in_forks():
        for name in ("gpt2", "untied llama"):
            export_checkpoint(workplace / name, folder / name, max_shard_bytes=100_000)
    alone = ["unshare", "--map-root-user", "--net"]
    seen = run_command(*alone, "cat", "/proc/net/dev")
    assert seen.returncode == 0, seen.stderr
    assert [line.split(":")[0].strip() for line in seen.stdout.splitlines()[2:]] == ["lo"]
    command = [sys.executable, "-c", TWICE, folder, "--model", "hf", "--device", "cpu"]
    command += ["--batch_size", "4", "--tasks", ",".join(TASKS)]
    command += ["--include_path", workplace / "tasks"]
    done = run_command(*alone, *command, environment={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are Linux's")
@pytest.mark.parametrize("name", ["gpt2", "untied llama"])
def test_plain_lm_eval_scores_an_export_in_an_empty_network_namespace(
    name, workplace, scored_alone
):
    (file,) = scored_alone.glob(f"{name}-scores/*/results_*.json")
    theirs = json.loads(file.read_text())
    options = {"include_path": workplace / "tasks", "device": "cpu"}
    ours = evaluate_folder(workplace / name, list(TASKS), **options)
    for task in TASKS:
        for metric, value in theirs["results"][task].items():
            if isinstance(value, float):
                assert ours["results"][task][metric] == pytest.approx(value, rel=1e-5)
