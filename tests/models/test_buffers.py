"""Buffers that a family saves with its weights are saved, loaded, resumed and exported."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretrain_lib import (
    CausalLMConfig,
    build_model,
    load_pretrained,
    open_corpus,
    save_pretrained,
    start_accelerator,
    train,
)
from pretrain_lib.export.export import export_checkpoint
from tests.conftest import VOCABULARY, change, reloading_in_forks, small_recipe
from tests.families import WITH_BUFFERS


def drawn(name):
    """Return a model of a family, with arbitrary values in the buffers that it saves."""
    model = build_model(CausalLMConfig(config=WITH_BUFFERS[name])).initialize(0)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = {n: t for n, t in model.state_dict().items() if n not in parameters}
    assert buffers
    for value, buffer in enumerate(buffers.values(), 1):
        buffer.fill_(value if buffer.dtype == torch.int64 else value / 3)
    return model


@pytest.mark.parametrize("name", WITH_BUFFERS)
def test_a_folder_is_that_of_transformers_and_is_loaded_again(name, tmp_path):
    model = drawn(name)
    save_pretrained(model, tmp_path / "ours", tokenizer=None)
    model.model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / f / "model.safetensors") for f in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    before, after = model.state_dict(), load_pretrained(tmp_path / "ours").state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_is_resumed_and_exported(dtype, prepared, tmp_path):
    recipe = change(small_recipe(prepared, tmp_path / "run"), schedule={"tokens": 4 * 256})
    fields = WITH_BUFFERS["deepseek_v3"] | {"vocab_size": VOCABULARY}
    recipe = dataclasses.replace(recipe, model=CausalLMConfig(config=fields))
    initial = build_model(recipe.model).initialize(0)
    bias = "model.model.layers.1.mlp.gate.e_score_correction_bias"
    initial.state_dict()[bias].fill_(1 / 3)
    save_pretrained(initial, tmp_path / "initial", tokenizer=None)
    recipe = change(recipe, run={"initial_weights": str(tmp_path / "initial")})
    for steps in (2, None):
        config = change(recipe, run={"max_steps": steps})
        with torch.device("meta"):
            model = build_model(config.model)
        train(config, model, open_corpus(config), start_accelerator(config))
        assert (model.state_dict()[bias] == 1 / 3).all()
    with reloading_in_forks():
        checkpoint = Path(recipe.run.dir) / "checkpoints" / "step-00000004"
        assert export_checkpoint(checkpoint, tmp_path / "export", dtype=dtype) <= 1e-5
