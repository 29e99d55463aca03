"""Whatever the folder, our model is the one that transformers loads from it, or it is refused."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pretrain_lib import load_pretrained
from tests.conftest import run_command
from tests.folders import KINDS, PLAIN, build, write_folders

ALWAYS_LOADED = ("one file", "shards", "saved again over shards", "one file beside older shards")


@torch.no_grad()
def logits_of(load, folder, refusals):
    """Return the logits of some ids, or the error by which the folder is refused."""
    ids = torch.arange(40).view(2, 20)
    try:
        found = load(folder).eval()(ids)
    except refusals as error:
        return str(error)
    return found if isinstance(found, torch.Tensor) else found.logits


def by_transformers(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def count_loaded(folders):
    """Return how many folders load, asserting that each has the logits that transformers gives."""
    loaded = 0
    for folder in folders:
        changes = json.loads((folder / "changes.json").read_text())
        ours = logits_of(load_pretrained, folder, ValueError)
        if isinstance(ours, str):
            assert ours.startswith(str(folder)), ours
            assert changes not in [PLAIN | {"layout": layout} for layout in ALWAYS_LOADED]
            continue
        theirs = logits_of(by_transformers, folder, (ValueError, OSError, RuntimeError))
        assert isinstance(theirs, torch.Tensor), (changes, theirs)
        difference = (ours - theirs).abs().max() / theirs.abs().max()
        assert float(difference) < 1e-4, changes
        loaded += 1
    return loaded


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_folder_is_loaded_as_another_model(kind, tmp_path):
    folders = write_folders(tmp_path, kind)
    assert len(folders) >= 24
    assert count_loaded(folders) >= 10


@pytest.fixture(scope="module")
def written_elsewhere(request, tmp_path_factory):
    """Folders of each kind that another version of transformers has written.

    FOLDERS_PYTHON may name the python of any version; by default it is 4.57.
    """
    out = tmp_path_factory.mktemp("elsewhere")
    python, environment = os.environ.get("FOLDERS_PYTHON"), None
    if python is None:
        python, environment = sys.executable, request.getfixturevalue("other")
    done = run_command(python, "tests/folders.py", out, environment=environment)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_folder_of_another_version_is_loaded_as_another_model(kind, written_elsewhere):
    folders = sorted(Path(written_elsewhere, kind).iterdir())
    assert len(folders) >= 24
    assert count_loaded(folders) >= 10


LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# What transformers computes otherwise than a plain GPT-2 or LLaMA.
FIELDS = [
    ("gpt2", {"num_hidden_layers": 1}),
    ("gpt2", {"num_attention_heads": 2}),
    ("gpt2", {"is_causal": False}),
    ("gpt2", {"activation_function": "gelu"}),
    ("gpt2", {"layer_norm_epsilon": 1e-2}),
    ("llama", {"is_causal": False}),
    ("llama", {"rope_scaling": LLAMA3, "original_max_position_embeddings": 16}),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": None}),
    ("llama", {"rope_parameters": {"rope_type": "default"}, "rope_theta": 77.0}),
    ("llama", {"per_layer_config": {"0": {"intermediate_size": 48}}}),
    ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
    ("llama", {"rms_norm_eps": None}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
]


@pytest.mark.parametrize(("kind", "fields"), FIELDS, ids=lambda value: str(value)[:40])
def test_a_field_that_changes_the_model_is_not_passed_over(kind, fields, tmp_path):
    build(KINDS[kind], "CausalLM", seed=0).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text()) | fields
    if "use_sliding_window" in fields:
        del written["layer_types"]  # which goes before it
    path.write_text(json.dumps(written))
    (tmp_path / "changes.json").write_text(json.dumps(fields))
    count_loaded([tmp_path])


def test_the_error_names_the_tensor_that_the_file_has(tmp_path):
    build(KINDS["gpt2"], "SequenceClassification", seed=0).save_pretrained(tmp_path)
    (name,) = [name for name in load_file(tmp_path / "model.safetensors") if "score" in name]
    with pytest.raises(ValueError, match=f"the tensor {name} has no place"):
        load_pretrained(tmp_path)


def test_an_index_that_names_another_folder_is_refused(tmp_path):
    build(KINDS["llama"], "CausalLM", seed=0).save_pretrained(tmp_path, max_shard_size="20KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {name: f"other/{file}" for name, file in index["weight_map"].items()}
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names other/model-0.*: weights must lie beside"):
        load_pretrained(tmp_path)


def test_rotary_frequencies_that_old_programs_stored_are_passed_over(tmp_path):
    build(KINDS["llama"], "CausalLM", seed=0).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "changes.json").write_text("{}")
    assert count_loaded([tmp_path]) == 1
