"""Runs that begin with the weights of a folder that transformers wrote."""

import dataclasses
import shlex
import shutil

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from pretrain_lib import (
    GPT2,
    Llama,
    LlamaConfig,
    build_model,
    open_corpus,
    start_accelerator,
    train,
)
from pretrain_lib.config.arguments import parse_recipe
from pretrain_lib.corpus.corpus import build_dataset
from pretrain_lib.export.export import export_checkpoint
from pretrain_lib.models.hf import load_pretrained
from pretrain_lib.models.rope import RopeScaling
from pretrain_lib.training.first_weights import check_first_weights, set_first_weights
from tests.conftest import (
    VOCABULARY,
    change,
    read_rows,
    run_recipe_script,
    small_recipe,
    tiny_flags,
)
from tests.distributed.test_sharding import SHARDED, run
from tests.families import family

NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
LLAMA = LlamaConfig(
    vocabulary_size=VOCABULARY,
    context_length=32,
    num_layers=2,
    num_heads=2,
    num_key_value_heads=1,
    width=32,
    mlp_width=48,
    rope_scaling=RopeScaling("llama3", 4.0, 8),
)
THEIRS = {
    "gpt2": transformers.GPT2Config(  # its dropout is 0.1, the recipe's 0
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=32, **NO_IDS
    ),
    "llama": transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
        },
        **NO_IDS,
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each family as `save_pretrained` of transformers writes it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("theirs")
    for name, config in THEIRS.items():
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)  # away from where all tokens are as likely
        model.save_pretrained(folder / name)
    return folder


def continuing(recipe, folder, name):
    model = {} if name == "gpt2" else {"model": LLAMA}
    recipe = dataclasses.replace(recipe, **model)
    return change(recipe, run={"initial_weights": str(folder / name)}, samples={"prompts": []})


@torch.no_grad()
def first_loss(recipe, folder):
    """Return the loss of transformers' model on the windows of the first step."""
    windows = build_dataset(recipe, open_corpus(recipe))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    losses = []
    for item in (windows[index] for index in range(recipe.batch_sizes().at(0))):
        logits = model(item["input_ids"][None]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits, item["targets"]))
    return float(torch.stack(losses).mean())


@pytest.mark.slow
@pytest.mark.parametrize("on_meta", [True, False])
@pytest.mark.parametrize("name", THEIRS)
def test_the_first_loss_is_that_of_transformers(
    name, on_meta, recipe, folders, tmp_path, monkeypatch, forked_reload
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    recipe = continuing(recipe, folders, name)
    corpus, accelerator = open_corpus(recipe), start_accelerator(recipe)
    with torch.device("meta" if on_meta else "cpu"):
        model = (GPT2 if name == "gpt2" else Llama)(recipe.model)
    train(recipe, model, corpus, accelerator)
    losses = [row["loss"] for row in read_rows(recipe.run.dir) if row["kind"] == "train"]
    assert losses[0] == pytest.approx(first_loss(recipe, folders / name), abs=2e-6)
    assert losses[-1] < losses[0] - 0.1
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000008"
    assert load_pretrained(checkpoint).config == recipe.model
    again = change(recipe, run={"initial_weights": recipe.run.dir})
    with pytest.raises(ValueError, match=f"is a run folder, .*: give {checkpoint}$"):
        check_first_weights(again)
    check_first_weights(change(recipe, run={"initial_weights": str(checkpoint)}))
    if on_meta and name == "llama":
        assert export_checkpoint(checkpoint, tmp_path / "out") < 1e-5
        card = (tmp_path / "out" / "README.md").read_text()
        assert f"| initial weights | {name} |" in card and str(folders) not in card


@pytest.mark.slow
def test_processes_that_share_a_model_begin_with_the_same_weights(
    prepared, recipe, folders, tmp_path
):
    run(SHARDED, [*flags(prepared, tmp_path, folders, "gpt2"), "--run.max_steps", "1"])
    (row,) = (row for row in read_rows(tmp_path / "run") if row["kind"] == "train")
    recipe = continuing(recipe, folders, "gpt2")
    assert row["loss"] == pytest.approx(first_loss(recipe, folders / "gpt2"), abs=2e-6)


def flags(prepared, tmp_path, folders, name, *more):
    weights = ("--run.initial_weights", str(folders / name))
    return [*tiny_flags(prepared, tmp_path / "run"), *weights, *more]


@pytest.mark.slow
def test_a_recipe_names_what_differs_and_takes_what_it_names(prepared, folders, tmp_path):
    smaller = ["--model.num_layers", "1", "--model.num_heads", "4", "--run.max_steps", "1"]
    refused = run_recipe_script(*flags(prepared, tmp_path, folders, "gpt2", *smaller))
    assert refused.returncode == 2
    message = "holds another model than model.num_layers=1, model.num_heads=4: give "
    assert message in refused.stderr
    remedy = refused.stderr.strip().split(message)[1].split(" ")
    assert remedy == ["--model.num_layers", "2", "--model.num_heads", "2"]
    begun = flags(prepared, tmp_path, folders, "gpt2", *smaller, *remedy)
    assert run_recipe_script(*begun).returncode == 0
    other = [*tiny_flags(prepared, tmp_path / "run"), "--run.max_steps", "2"]
    resumed = run_recipe_script(*other)  # the run would not be the one that was begun
    assert resumed.returncode == 2
    assert "run.initial_weights was" in resumed.stderr


def test_other_models_are_refused_by_field(recipe, folders, tmp_path):
    llama = continuing(recipe, folders, "llama")
    check_first_weights(llama)
    with pytest.raises(ValueError, match="is a Llama, the recipe trains a GPT2"):
        check_first_weights(change(recipe, run={"initial_weights": str(folders / "llama")}))
    with pytest.raises(ValueError, match="initial_weights=/none is no folder"):
        check_first_weights(change(recipe, run={"initial_weights": "/none"}))
    with pytest.raises(ValueError, match="both say where to begin"):
        check_first_weights(change(llama, run={"resume": str(tmp_path)}))
    plain = change(llama, model={"rope_scaling": None})
    with pytest.raises(ValueError, match="than model.rope_scaling=None: give") as refusal:
        check_first_weights(plain)
    flags = shlex.split(str(refusal.value).split(": give ")[1])
    assert parse_recipe(plain, arguments=flags)[0].model == llama.model


def test_a_name_on_the_hub_is_looked_up_in_its_cache(recipe, folders, tmp_path, monkeypatch):
    """The cache of the hub as its client lays it out; no network is asked."""
    cached = tmp_path / "hub" / "models--someone--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    shutil.copytree(folders / "gpt2", cached / "snapshots" / "abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    named = change(recipe, run={"initial_weights": "someone/tiny"})
    check_first_weights(named)
    model = GPT2(named.model)
    set_first_weights(named, model, has_weights=False)
    expected = load_pretrained(folders / "gpt2").state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    missing = change(recipe, run={"initial_weights": "someone/other"})
    with pytest.raises(ValueError, match="no folder, and the Hugging Face Hub has no such model"):
        check_first_weights(missing)


def test_a_family_of_transformers_begins_with_a_folder_of_it(prepared, tmp_path):
    config = family("olmo2", vocab_size=VOCABULARY)
    theirs = build_model(config).initialize(5)
    theirs.model.save_pretrained(tmp_path / "weights")
    small = dataclasses.replace(small_recipe(prepared, tmp_path), model=config)
    small = change(small, run={"initial_weights": str(tmp_path / "weights")})
    check_first_weights(small)
    with torch.device("meta"):
        model = build_model(config)
    model.to_empty(device="cpu")
    set_first_weights(small, model, has_weights=False)
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert torch.equal(model.eval()(ids), theirs.eval()(ids))
    other = family("olmo2", vocab_size=VOCABULARY, rope_theta=77.0)
    with pytest.raises(ValueError, match="another model than model.config.*77.0"):
        check_first_weights(dataclasses.replace(small, model=other))
