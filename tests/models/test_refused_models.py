"""What is no causal language model, or does not fit its folder, is refused in one line."""

import json

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

import pretrain_lib as pl
from tests.models.test_places import MODELS

SHAPE = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": None}
BERT = {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_adapter_takes_causal_language_models_only(device):
    with torch.device(device):
        whole = Qwen2ForCausalLM(Qwen2Config(**SHAPE))
        assert pl.CausalLMAdapter(whole).config.model_type == "qwen2"
        other = Qwen2ForSequenceClassification(Qwen2Config(**SHAPE))
        for model in (whole.model, other):
            with pytest.raises(ValueError, match=rf"^{type(model).__name__} is .*Qwen2ForCausalLM"):
                pl.CausalLMAdapter(model)
        pl.CausalLMAdapter(BertLMHeadModel(BertConfig(**BERT, is_decoder=True)))
        with pytest.raises(ValueError, match=r"^model\.config: tokens of bert attend to later"):
            pl.CausalLMAdapter(BertLMHeadModel(BertConfig(**BERT)))
    for other in ("gpt2", MODELS["gpt2"](), pl.GPT2):
        with pytest.raises(ValueError, match=r"^model is .* must be a model of transformers"):
            pl.CausalLMAdapter(other)


@pytest.mark.parametrize(
    ("model", "changes", "reason"),
    [
        (
            GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2)),
            {"n_inner": 96},
            r"transformer\.h\.0\.mlp\.c_fc\.bias has shape \(64,\), .* needs \(96,\)$",
        ),
        (
            OlmoeForCausalLM(OlmoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2)),
            {"vocab_size": 67},
            r"lm_head\.weight has shape \(61, 16\), the model of config.json needs \(67, 16\)$",
        ),
    ],
)
def test_a_folder_of_other_shapes_is_refused_by_the_tensor(model, changes, reason, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=f"^{tmp_path}: {reason}"):
        pl.load_pretrained(tmp_path)


@pytest.mark.parametrize("changed", [{"context_length": 0}, {"new_tokens": -1}])
def test_generation_without_a_context_is_refused(changed):
    model, options = MODELS["gpt2"](), {"new_tokens": 2, "context_length": 8} | changed
    with pytest.raises(ValueError, match=r"^context_length=.*, new_tokens=.*: at least one token"):
        pl.generate(model, [[1, 2]], **options)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_an_empty_micro_batch_has_no_loss_and_gradients_of_zero(name):
    model, ids = MODELS[name](), torch.zeros(0, 8, dtype=torch.int64)
    for ends in (None, torch.zeros(0, 3, dtype=torch.int32)):
        loss, count = model(ids, ids, document_ends=ends)
        loss.backward()
        assert loss == 0 and count == 0
        assert all((p.grad.to_dense() == 0).all() for p in model.parameters())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_model_on_the_meta_device_has_a_loss_of_a_shape(name):
    with torch.device("meta"):
        model, ids = MODELS[name](), torch.zeros(2, 8, dtype=torch.int64)
    assert model(ids).shape == (2, 8, 61)
    loss, count = model(ids, ids)
    loss.backward()
    assert loss.is_meta and loss.shape == count.shape == ()
    assert all(p.grad.shape == p.shape for p in model.parameters())


def test_rope_scaling_is_taken_as_a_mapping_or_refused_by_field():
    shape = {"num_layers": 2, "num_heads": 2, "num_key_value_heads": 2, "width": 32}
    written = {"kind": "linear", "factor": 2.0}
    config = pl.LlamaConfig(**shape, rope_scaling=written)
    assert config == pl.LlamaConfig(**shape, rope_scaling=pl.RopeScaling(**written))
    for wrong, reason in (
        ({"kind": "linear"}, r"^model\.rope_scaling=\{.*\} must be .* lacks factor$"),
        (
            written | {"rope_type": "linear"},
            r"^model\.rope_scaling=.* .*: it has no rope_type",
        ),
        ({"kind": "linear", "factor": "2"}, r"^model\.rope_scaling\.factor=2 \(str\) must be "),
    ):
        with pytest.raises(ValueError, match=reason):
            pl.LlamaConfig(**shape, rope_scaling=wrong)


def test_the_options_of_a_model_are_set_or_refused():
    model = MODELS["llama"]()
    pl.set_up_model(model, activation_checkpointing="full", z_loss=1e-4)
    assert model.options == pl.TrainingOptions(compiled=False, z_loss=1e-4)
    assert {block.activation_checkpointing for block in model.blocks} == {"full"}
    for wrong in ({"activation_checkpointing": "ful"}, {"z_loss": -1.0}):
        with pytest.raises(ValueError, match=rf"^{next(iter(wrong))}=\S+ must be "):
            pl.set_up_model(model, **wrong)
