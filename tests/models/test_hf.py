"""Folders of transformers: logits equal both ways, exact round trips, refusals, the adapter."""

import json

import pytest
import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pretrain_lib.data.text.tokenizer import train_tokenizer
from pretrain_lib.models.adapter import CausalLMAdapter
from pretrain_lib.models.any_model import save_pretrained
from pretrain_lib.models.gpt2 import GPT2Config
from pretrain_lib.models.hf import (
    build_model,
    hf_tensors,
    load_pretrained,
)
from pretrain_lib.models.llama import LlamaConfig
from pretrain_lib.models.loss import CHUNK_BYTES

ODD = 61  # an odd vocabulary, so that padding rows exist
SHAPE = {"vocabulary_size": ODD, "context_length": 48, "num_layers": 2, "num_heads": 4, "width": 32}
OURS = {
    "gpt2": GPT2Config(**SHAPE),
    "llama": LlamaConfig(**SHAPE, num_key_value_heads=4, mlp_width=80),
    "tied llama": LlamaConfig(**SHAPE, num_key_value_heads=4, mlp_width=80, tied_head=True),
    "grouped llama": LlamaConfig(
        **SHAPE, num_key_value_heads=2, mlp_width=80, rope_theta=500.0, norm_epsilon=1e-3
    ),
    "tied one-group llama": LlamaConfig(
        **SHAPE, num_key_value_heads=1, mlp_width=80, tied_head=True
    ),
    "wide-headed llama": LlamaConfig(**SHAPE, num_key_value_heads=2, mlp_width=80, head_width=24),
    "qwen3": LlamaConfig(**SHAPE, num_key_value_heads=4, mlp_width=80, qk_norm=True),
    "tied wide-headed qwen3": LlamaConfig(
        **SHAPE,
        num_key_value_heads=2,
        mlp_width=80,
        head_width=24,
        qk_norm=True,
        rope_theta=500.0,
        norm_epsilon=1e-3,
        tied_head=True,
    ),
}
HF_SHAPE = {
    "vocab_size": ODD,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GPT2_SHAPE = {
    "vocab_size": ODD,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 48,
    "bos_token_id": None,
    "eos_token_id": None,
}
THEIRS = {
    "gpt2": transformers.GPT2Config(**GPT2_SHAPE),
    "llama": transformers.LlamaConfig(**HF_SHAPE),
    "tied llama": transformers.LlamaConfig(**HF_SHAPE, tie_word_embeddings=True),
    "grouped llama": transformers.LlamaConfig(
        **HF_SHAPE,
        num_key_value_heads=2,
        rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    ),
    "tied one-group llama": transformers.LlamaConfig(
        **HF_SHAPE, num_key_value_heads=1, tie_word_embeddings=True
    ),
    "wide-headed llama": transformers.LlamaConfig(**HF_SHAPE, num_key_value_heads=2, head_dim=24),
    "qwen3": transformers.Qwen3Config(**HF_SHAPE, num_key_value_heads=4, head_dim=8),
    "tied wide-headed qwen3": transformers.Qwen3Config(
        **HF_SHAPE,
        num_key_value_heads=2,
        head_dim=24,
        rms_norm_eps=1e-3,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    ),
}


def random_ids(rows=2, length=48):
    return torch.randint(ODD, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def randomize(model, seed=0):
    """Set every parameter at random, norms and biases too, so that none can be lost unseen."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        centre = 0.0 if parameter.dim() == 2 else 0.5
        parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def ours_at_random(name):
    model = build_model(OURS[name])
    randomize(model)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(("wte.weight", "embed_tokens.weight", "lm_head.weight")):
            parameter.detach()[ODD:] = 0.0
    return model


def theirs_at_random(config, seed=0):
    model = AutoModelForCausalLM.from_config(config)
    return randomize(model, seed)


def saved(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def assert_close_logits(ours, theirs):
    """Assert that two models agree to 1e-4 of the largest logit."""
    ids = random_ids()
    with torch.no_grad():
        first, second = ours.eval()(ids), theirs.eval()(input_ids=ids).logits
    assert first.shape == second.shape == (2, 48, ODD)
    assert (first - second).abs().max() < 1e-4 * second.abs().max()


@pytest.mark.parametrize("name", OURS)
def test_transformers_loads_our_weights_with_equal_logits(name, tmp_path):
    model = ours_at_random(name)
    save_pretrained(model, tmp_path, tokenizer=None)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_close_logits(model, theirs)


@pytest.mark.parametrize("name", THEIRS)
def test_we_load_the_weights_of_transformers_with_equal_logits(name, tmp_path):
    theirs = theirs_at_random(THEIRS[name])
    ours = load_pretrained(saved(theirs, tmp_path))
    assert type(ours.config) is type(OURS[name])
    assert ours.head_weight.shape[0] == 128
    assert_close_logits(ours, theirs)


@pytest.mark.parametrize("multiple", [1, 128])
@pytest.mark.parametrize("name", OURS)
def test_saving_and_loading_is_bit_exact_through_the_padding(name, multiple, tmp_path):
    model = ours_at_random(name)
    save_pretrained(model, tmp_path, tokenizer=None)
    stored = load_file(tmp_path / "model.safetensors")
    assert not any(128 in tensor.shape for key, tensor in stored.items() if "c_" not in key)
    loaded = load_pretrained(tmp_path, vocabulary_multiple=multiple)
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for key, tensor in after.items():
        assert torch.equal(before[key][: len(tensor)], tensor)
    if multiple == 128:
        assert loaded.config == model.config


def test_bf16_folders_hold_the_rounded_weights(tmp_path):
    model = ours_at_random("gpt2")
    save_pretrained(model, tmp_path, tokenizer=None, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = load_pretrained(tmp_path).state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded[key], tensor.bfloat16().float())


def test_folder_of_llama_holds_what_both_major_versions_of_transformers_read(tmp_path):
    tokenizer = train_tokenizer(["some words to learn from " * 9], vocabulary_size=280)
    config = LlamaConfig(
        **SHAPE | {"vocabulary_size": tokenizer.vocabulary_size},
        num_key_value_heads=2,
        mlp_width=80,
        rope_theta=500.0,
    )
    save_pretrained(build_model(config).initialize(0), tmp_path, tokenizer=tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    written = json.loads((tmp_path / "config.json").read_text())
    expected = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": tokenizer.vocabulary_size,
        "rope_theta": 500.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "dtype": "float32",
        "bos_token_id": tokenizer.end_of_text_id,
        "eos_token_id": tokenizer.end_of_text_id,
    }
    assert expected.items() <= written.items()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    text = "words from <|endoftext|> some"
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.model_max_length == 48
    ids = theirs(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
    assert ids == tokenizer.encode(text)


def test_folder_of_gpt2_is_a_tied_gpt2_of_transformers(tmp_path):
    save_pretrained(ours_at_random("gpt2"), tmp_path, tokenizer=None)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "gpt2" and written["tie_word_embeddings"] is True
    names = set(load_file(tmp_path / "model.safetensors"))
    theirs = AutoModelForCausalLM.from_config(THEIRS["gpt2"])
    assert names == {name for name, _ in theirs.named_parameters()}
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_sharded_folders_load(name, tmp_path):
    theirs = theirs_at_random(THEIRS[name])
    saved(theirs, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_close_logits(load_pretrained(tmp_path), theirs)
    next(tmp_path.glob("model-00002-*.safetensors")).unlink()
    with pytest.raises(ValueError, match="model-00002-of-.*missing"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_dealt_to_files_as_the_hub_does(dtype, tmp_path):
    model, options = build_model(OURS["llama"]).initialize(0), {"tokenizer": None, "dtype": dtype}
    digests = save_pretrained(model, tmp_path, **options, max_shard_bytes=20_000)
    tensors = {key: tensor.to(dtype).clone() for key, tensor in hf_tensors(model).items()}
    expected = split_torch_state_dict_into_shards(tensors, max_shard_size=20_000)
    names = sorted(expected.filename_to_tensors)
    assert len(names) > 2
    assert list(digests) == names == sorted(path.name for path in tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == expected.metadata["total_size"]
    assert index["weight_map"] == expected.tensor_to_filename
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_close_logits(load_pretrained(tmp_path), theirs)


def test_a_tensor_larger_than_a_file_may_be_has_a_file_of_its_own(tmp_path):
    model = ours_at_random("gpt2")
    save_pretrained(model, tmp_path, tokenizer=None, max_shard_bytes=1)
    tensors = len(list(model.parameters()))
    assert len(list(tmp_path.glob(f"model-*-of-{tensors:05d}.safetensors"))) == tensors
    assert_close_logits(model, AutoModelForCausalLM.from_pretrained(tmp_path))


@pytest.mark.parametrize("first_bytes", [None, 20_000], ids=["one file", "shards"])
def test_a_folder_that_is_written_again_holds_the_last_model_alone(first_bytes, tmp_path):
    models = [randomize(build_model(OURS["llama"]), seed) for seed in (0, 1)]
    save_pretrained(models[0], tmp_path, tokenizer=None, max_shard_bytes=first_bytes)
    second_bytes = 20_000 if first_bytes is None else None
    save_pretrained(models[1], tmp_path, tokenizer=None, max_shard_bytes=second_bytes)
    assert_close_logits(models[1], AutoModelForCausalLM.from_pretrained(tmp_path))
    assert_close_logits(load_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path))


def test_one_file_goes_before_the_index_that_an_earlier_writer_left(tmp_path):
    saved(theirs_at_random(THEIRS["llama"], seed=0), tmp_path, max_shard_size="20KB")
    index = (tmp_path / "model.safetensors.index.json").read_text()
    theirs = theirs_at_random(THEIRS["llama"], seed=1)
    saved(theirs, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert_close_logits(load_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path))
    assert_close_logits(load_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("name", ["gpt2", "tied llama"])
def test_a_tied_head_that_is_stored_with_other_values_is_refused(name, tmp_path):
    saved(theirs_at_random(THEIRS[name]), tmp_path)
    table = "transformer.wte.weight" if name == "gpt2" else "model.embed_tokens.weight"
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t[table].clone()}))
    assert_close_logits(load_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path))
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t[table] + 0.1}))
    with pytest.raises(ValueError, match="lm_head.weight differs from .*tie_word_embeddings"):
        load_pretrained(tmp_path)


def test_gpt2_folders_without_the_prefix_and_with_stored_masks_load(tmp_path):
    theirs = theirs_at_random(THEIRS["gpt2"])
    saved(theirs, tmp_path)

    def as_on_the_hub(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 48, 48)
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()

    edit_tensors(tmp_path, as_on_the_hub)
    assert_close_logits(load_pretrained(tmp_path), theirs)


@pytest.fixture
def llama_folder(tmp_path):
    return saved(theirs_at_random(THEIRS["llama"]), tmp_path)


@pytest.fixture
def gpt2_folder(tmp_path):
    return saved(theirs_at_random(THEIRS["gpt2"]), tmp_path)


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        load_pretrained(tmp_path)


def test_a_missing_tensor_is_refused_by_name(llama_folder):
    edit_tensors(llama_folder, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ValueError, match="model.norm.weight.*missing"):
        load_pretrained(llama_folder)


def test_a_tensor_without_a_place_is_refused_by_name(llama_folder):
    edit_tensors(llama_folder, lambda tensors: tensors.update(extra=torch.zeros(1)))
    with pytest.raises(ValueError, match="extra has no place"):
        load_pretrained(llama_folder)


def test_a_tensor_of_another_shape_is_refused_with_both_shapes(gpt2_folder):
    name = "transformer.h.1.mlp.c_fc.weight"
    edit_tensors(gpt2_folder, lambda t: t.update({name: t[name].t().contiguous()}))
    with pytest.raises(ValueError, match=r"c_fc.weight has shape \(128, 32\).*\(32, 128\)"):
        load_pretrained(gpt2_folder)


def test_a_table_with_another_number_of_rows_is_refused(llama_folder):
    name = "lm_head.weight"
    edit_tensors(llama_folder, lambda t: t.update({name: t[name][:-1].contiguous()}))
    with pytest.raises(ValueError, match=r"lm_head.weight has shape \(60, 32\).*\(61, 32\)"):
        load_pretrained(llama_folder)


def test_another_family_is_refused_and_its_recipe_named(llama_folder):
    edit_config(llama_folder, model_type="mamba")
    with pytest.raises(ValueError, match="model_type='mamba'.*gpt2, llama, qwen3.*causal_lm"):
        load_pretrained(llama_folder)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        {"rope_scaling": {"type": "linear"}},
        {"rope_scaling": {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 4}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_variants_of_llama_that_we_do_not_compute_are_refused(llama_folder, change):
    load_pretrained(llama_folder)
    edit_config(llama_folder, **change)
    rule = "rotary scaling" if "rope" in str(change) else next(iter(change))
    with pytest.raises(ValueError, match=f"config.json: {rule}"):
        load_pretrained(llama_folder)


@pytest.mark.parametrize(
    "change",
    [
        {"activation_function": "relu"},
        {"layer_norm_epsilon": 1e-6},
        {"n_inner": 64},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"tie_word_embeddings": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_variants_of_gpt2_that_we_do_not_compute_are_refused(gpt2_folder, change):
    load_pretrained(gpt2_folder)
    edit_config(gpt2_folder, **change)
    with pytest.raises(ValueError, match="config.json: " + next(iter(change))):
        load_pretrained(gpt2_folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": "linear"}, "another type .* rope_scaling='linear' must be an object"),
        ({"rope_scaling": [1]}, r"another type .* rope_scaling=\[1\] must be an object"),
        ({"rope_parameters": 5, "rope_scaling": None}, "rope_parameters=5 must be an object"),
        ({"num_attention_heads": 0}, "num_heads=0 must be a whole number of at least 1"),
    ],
    ids=str,
)
def test_a_field_of_another_type_or_size_is_refused_by_name(llama_folder, change, message):
    edit_config(llama_folder, **change)
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(llama_folder)
    assert "\n" not in str(error.value)


def test_a_folder_with_pickled_weights_alone_is_refused(llama_folder):
    torch.save(load_file(llama_folder / "model.safetensors"), llama_folder / "pytorch_model.bin")
    (llama_folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="safetensors only"):
        load_pretrained(llama_folder)


# They scale, cap or shift what the matrix gives.
OTHER_HEADS = {
    "phi": transformers.PhiConfig(**HF_SHAPE),
    "gptj": transformers.GPTJConfig(**GPT2_SHAPE, rotary_dim=4),
    "granite": transformers.GraniteConfig(**HF_SHAPE, logits_scaling=8.0),
    "cohere": transformers.CohereConfig(**HF_SHAPE),
    "gemma2": transformers.Gemma2Config(**HF_SHAPE, num_key_value_heads=2, head_dim=8),
    "gemma3": transformers.Gemma3TextConfig(
        **HF_SHAPE, num_key_value_heads=2, head_dim=8, final_logit_softcapping=30.0
    ),
}


ADAPTED = {
    "gpt_neox": transformers.GPTNeoXConfig(**HF_SHAPE),
    "qwen2": transformers.Qwen2Config(**HF_SHAPE, num_key_value_heads=2),
    "mistral": transformers.MistralConfig(**HF_SHAPE, num_key_value_heads=2),
    "olmo2": transformers.Olmo2Config(**HF_SHAPE, num_key_value_heads=2),
}


@pytest.mark.parametrize("name", [*ADAPTED, *OTHER_HEADS])
def test_adapter_has_the_loss_and_gradients_of_transformers(name, monkeypatch):
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 7 * ODD * 4)  # seven rows of logits at a time
    model = theirs_at_random((ADAPTED | OTHER_HEADS)[name])
    ids = random_ids(3, 20)
    model(input_ids=ids, labels=ids).loss.backward()
    expected_loss = model(input_ids=ids, labels=ids).loss.item()
    expected = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    loss, count = CausalLMAdapter(model)(ids[:, :-1], ids[:, 1:])
    (loss / count).backward()
    assert count.item() == 3 * 19
    assert loss.item() == pytest.approx(expected_loss * 3 * 19, rel=1e-5)
    for key, parameter in model.named_parameters():
        scale = expected[key].abs().max().item()
        torch.testing.assert_close(parameter.grad, expected[key], rtol=0, atol=1e-4 * scale + 1e-7)


@pytest.mark.parametrize("name", ADAPTED)
@torch.no_grad()
def test_adapter_keeps_documents_apart(name):
    adapter = CausalLMAdapter(theirs_at_random(ADAPTED[name]))
    ids = random_ids(2, 24)
    ends = torch.tensor([[9, 24, 24], [4, 9, 24]])
    logits = adapter(ids, document_ends=ends)
    changed = ids.clone()
    changed[:, :9] = (changed[:, :9] + 1) % ODD
    assert torch.equal(adapter(changed, document_ends=ends)[:, 9:], logits[:, 9:])
    assert not torch.allclose(adapter(changed)[:, 9:], adapter(ids)[:, 9:])
    torch.testing.assert_close(logits[:, 9:], adapter(ids[:, 9:]), rtol=1e-4, atol=1e-4)


LEAKING = {
    "opt": transformers.OPTConfig(
        vocab_size=ODD,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=48,
    ),
    "bloom": transformers.BloomConfig(vocab_size=ODD, hidden_size=32, n_layer=2, n_head=4),
    "mpt": transformers.MptConfig(vocab_size=ODD, d_model=32, n_layers=2, n_heads=4),
    "mamba": transformers.MambaConfig(vocab_size=ODD, hidden_size=32, num_hidden_layers=2),
}


@pytest.mark.parametrize("name", LEAKING)
@torch.no_grad()
def test_adapter_refuses_documents_where_the_family_would_mix_them(name):
    """These take no notice of positions that restart: the next document would see the last."""
    adapter = CausalLMAdapter(AutoModelForCausalLM.from_config(LEAKING[name]).eval())
    with pytest.raises(ValueError, match="document"):
        adapter(random_ids(1, 20), document_ends=torch.tensor([[8, 20]]))


def test_adapter_leaves_the_mode_of_the_model():
    for training in (True, False):
        model = theirs_at_random(ADAPTED["qwen2"]).train(training)
        CausalLMAdapter(model)
        assert model.training is training


@pytest.mark.parametrize(
    ("kind", "field", "alias"),
    [
        ("gpt2", "activation_function", "gelu_pytorch_tanh"),
        ("llama", "hidden_act", "swish"),
    ],
)
@torch.no_grad()
def test_another_name_of_the_same_function_is_the_same_model(kind, field, alias, tmp_path):
    model = build_model(OURS[kind]).initialize(0)
    save_pretrained(model, tmp_path, tokenizer=None)
    edit_config(tmp_path, **{field: alias})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = random_ids(2, 20)
    logits = load_pretrained(tmp_path).eval()(ids)
    torch.testing.assert_close(logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_gpt2_names_its_context_as_converters_read_it(tmp_path):
    save_pretrained(build_model(OURS["gpt2"]), tmp_path, tokenizer=None)
    described = json.loads((tmp_path / "config.json").read_text())
    assert described["n_ctx"] == described["n_positions"] == 48
