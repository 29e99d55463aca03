"""The configuration of any causal language model: its notations, and what is refused by name."""

import json
import logging
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain_lib import CausalLMConfig, GPT2Config, LlamaConfig, build_model
from pretrain_lib.config.arguments import parse_recipe
from pretrain_lib.models.any_model import check_model
from pretrain_lib.models.flops import count_parameters, model_flops
from pretrain_lib.models.transformers_config import ConfigFields
from pretrain_lib.models.transformers_family import check_causal
from tests.conftest import ROOT
from tests.families import FAMILIES, GROUPED, UNCOMMON, WITH_BUFFERS, family

sys.path.insert(0, str(ROOT / "recipes"))
import causal_lm  # noqa: E402

OVERLAYS = {
    "pythia_160m": 162_322_944,
    "smollm2_135m": 134_515_008,
    "qwen3_0_6b": 596_049_920,
}


@pytest.mark.parametrize("way", ["file", "folder", "json", "yaml", "mapping"])
def test_every_notation_is_the_same_model(way, tmp_path):
    fields = FAMILIES["gemma3"]
    origin = {"transformers_version": "4.57.0", "torch_dtype": "bfloat16", "_name_or_path": "x"}
    (tmp_path / "config.json").write_text(json.dumps(fields | origin))
    lines = ", ".join(f"{key}: {json.dumps(value)}" for key, value in fields.items())
    written = {
        "file": str(tmp_path / "config.json"),
        "folder": str(tmp_path),
        "json": json.dumps(fields),
        "yaml": f"{{{lines}}}",
        # As YAML overlays give it: every scalar is text.
        "mapping": {key: str(value) for key, value in fields.items()},
    }[way]
    if way == "mapping":
        written["layer_types"] = fields["layer_types"]
    assert ConfigFields.parse(written) == fields
    assert CausalLMConfig(config=written).hf.to_dict() == family("gemma3").hf.to_dict()


def test_a_name_on_the_hub_is_looked_up_in_its_cache(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text(json.dumps(FAMILIES["olmo2"]))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert ConfigFields.parse("someone/tiny") == FAMILIES["olmo2"]


def test_changes_replace_fields_and_the_vocabulary_of_the_data_is_one_of_them():
    config = family("qwen3", num_hidden_layers=3)
    assert config.num_layers == 3
    other = config.with_vocabulary_size(100)
    assert (other.vocabulary_size, other.num_layers) == (100, 3)
    assert config.vocabulary_size == 61


def test_ids_that_the_vocabulary_has_not_are_unset_without_a_warning(monkeypatch):
    logger, warnings = logging.getLogger("transformers"), []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", warnings.append)
    monkeypatch.setattr(logger, "handlers", [handler])
    config = family("qwen3", bos_token_id=151_643, eos_token_id=7, pad_token_id=7)
    assert (config.hf.bos_token_id, config.hf.eos_token_id) == (None, 7)
    assert config.hf.pad_token_id is None  # its embedding would not be trained
    assert not warnings


REFUSED = {
    "{hidden_size: 8}": "names no model_type",
    "{model_type: t5}": "model_type=t5 is an encoder-decoder|no causal language model",
    "{model_type: qwen3, is_encoder_decoder: true}": "is an encoder-decoder",
    "{model_type: marvel, auto_map: {AutoModelForCausalLM: x.y}}": "needs code from the hub",
    "{model_type: qwen33}": "is unknown to the installed version of transformers; did you mean",
    "{model_type: vit}": "no causal language model for model_type=vit",
    "{model_type: qwen3, quantization_config: {bits: 4}}": "quantized weights",
    "{model_type: llava}": "holds several models|no causal language model",
    "{model_type: gemma3}": "holds several models; give the fields of its text model alone",
    "{model_type: qwen3, num_hidden_layers: many}": "is refused by transformers",
    "no/such-model": "neither a file nor a folder, and the Hugging Face Hub has no config.json",
}


@pytest.mark.parametrize("written", REFUSED)
def test_what_cannot_be_trained_is_refused_by_name(written):
    with pytest.raises(ValueError, match=REFUSED[written]):
        parse_recipe(causal_lm.RECIPE, arguments=["--model.config", written])


def test_a_model_that_sees_what_it_is_to_predict_is_refused():
    shape = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    with pytest.raises(ValueError, match="tokens of bert attend to later ones"):
        check_causal(CausalLMConfig(config={"model_type": "bert", **shape}))
    check_causal(CausalLMConfig(config={"model_type": "bert", "is_decoder": True, **shape}))


@pytest.mark.parametrize("name", OVERLAYS)
def test_overlays_have_the_shapes_of_published_models(name):
    flags = ["--config", str(ROOT / "recipes" / f"{name}.yaml")]
    config, _ = parse_recipe(causal_lm.RECIPE, arguments=flags)
    config.check(processes=8)
    with torch.device("meta"):
        assert count_parameters(build_model(config.model)) == OVERLAYS[name]


def test_the_recipe_has_the_parameters_that_it_says():
    causal_lm.RECIPE.check(processes=8)
    with torch.device("meta"):
        model = build_model(causal_lm.RECIPE.model)
    assert count_parameters(model) == 190_550_784


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_flops_are_those_of_the_same_model_of_this_library(name):
    shape = {"vocabulary_size": 61, "context_length": 64, "num_layers": 2, "num_heads": 4}
    llama = shape | {"width": 32, "num_key_value_heads": 2, "mlp_width": 48}
    fields = FAMILIES["mistral"] | {"model_type": "llama"}
    pair = {
        "llama": (LlamaConfig(**llama), fields),
        "qwen3": (
            LlamaConfig(**llama, qk_norm=True, head_width=8, tied_head=True),
            FAMILIES["qwen3"],
        ),
        "gpt2": (
            GPT2Config(**shape, width=32),
            {"model_type": "gpt2", "vocab_size": 61, "n_positions": 64, "n_layer": 2, "n_head": 4}
            | {"n_embd": 32},
        ),
    }[name]
    with torch.device("meta"):
        ours, theirs = build_model(pair[0]), build_model(CausalLMConfig(config=pair[1]))
    assert count_parameters(ours) == count_parameters(theirs)
    assert model_flops(ours, sequence_length=48) == model_flops(theirs, sequence_length=48)


# Those of which torch's counter sees every product of attention, as no window is shorter.
COUNTED = ("qwen3", "smollm3", "gpt_neox", "granite", "qwen3_moe", "minicpm3", "llama4", "gemma4")
COUNTED += ("dory", "inkling")


@pytest.mark.parametrize("name", [*COUNTED, "deepseek_v3"])
def test_flops_of_attention_are_three_times_those_that_torch_counts_in_a_forward(name):
    config = CausalLMConfig(config=(FAMILIES | UNCOMMON | WITH_BUFFERS)[name])
    model = build_model(config).initialize(0).eval()
    counted, own = [], []
    for length in (16, 32):
        ids = torch.zeros(1, length, dtype=torch.int64)
        math = sdpa_kernel(SDPBackend.MATH)  # shows attention as two full products
        with torch.no_grad(), math, FlopCounterMode(display=False) as counter:
            model(ids)
        counted.append(counter.get_flop_counts()["Global"][torch.ops.aten.bmm] / length)
        own.append(model_flops(model, sequence_length=length).attention)
    # Of products in batches, as of heads and experts, those of attention grow with the length.
    assert own[1] - own[0] == 3 * (counted[1] - counted[0]) > 0


def counted_in_training(model, length):
    """Return the FLOPs per token of a forward and a backward pass, of attention and of the rest."""
    ids = torch.zeros(1, length, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids).sum().backward()
    attention = counter.get_flop_counts()["Global"][torch.ops.aten.bmm] / length
    return attention, counter.get_total_flops() / length - attention


def test_layers_of_a_loop_count_each_time():
    own, counted = [], []
    for loops in (1, 4):
        changes = {"num_hidden_layers": 4, "n_input_layers": 1, "n_output_layers": 1}
        model = build_model(family("dory", **changes, n_recurrent_loops=loops)).initialize(0)
        own.append(model_flops(model, sequence_length=16))
        counted.append(counted_in_training(model, 16))
    attention, rest = (more - once for once, more in zip(*counted, strict=True))
    assert own[1].attention - own[0].attention == attention > 0
    # By convention vectors count, though they are no matrix products.
    vectors = sum(p.numel() for b in model.blocks[1:3] for p in b.parameters() if p.dim() == 1)
    assert own[1].parameters - own[0].parameters == rest + 6 * 3 * vectors


def test_loops_without_gradients_count_as_a_forward_alone():
    config = CausalLMConfig(config=GROUPED | {"model_type": "hrm_text", "head_dim": 8})
    model = build_model(config).initialize(0)
    _, rest = counted_in_training(model, 16)
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    own = model_flops(model, sequence_length=16).parameters
    assert own == pytest.approx(rest + 6 * vectors, rel=1e-12)


WIDTH = 12 * 32  # FLOPs of a layer for each token that is seen
KINDS = {
    "a window in all layers": ("mistral", {}, 2 * 12),
    "chunks": ("llama4", {"attention_chunk_size": 8}, 2 * 8),
    "a state space beside attention": ("falcon_h1", {}, 2 * 32),
    "a window in layers of twice the width": ("inkling", {"sliding_window_size": 8}, 2 * 2 * 8),
    "states alone": ("qwen3_next", {}, 0),
    "one layer of attention": (
        "qwen3_next",
        {"layer_types": ["linear_attention", "full_attention"]},
        32,
    ),
}


def test_every_other_layer_of_gpt_neo_attends_to_a_window():
    kinds = [[["global", "local"], 2]]
    fields = {"model_type": "gpt_neo", "attention_types": kinds, "window_size": 8}
    fields |= {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "vocab_size": 61}
    with torch.device("meta"):
        model = build_model(CausalLMConfig(config=fields))
    assert model_flops(model, sequence_length=32).attention == WIDTH * 2 * (32 + 8)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_attend_to_the_tokens_of_their_kind(kind):
    name, changes, tokens = KINDS[kind]
    with torch.device("meta"):
        model = build_model(family(name, **changes))
    assert model_flops(model, sequence_length=32).attention == WIDTH * tokens


def test_flops_of_windows_states_and_experts():
    def flops(config, length=32):
        with torch.device("meta"):
            model = build_model(config)
        return model, model_flops(model, sequence_length=length)

    _, gemma = flops(family("gemma3"))  # a layer of a window of 8, and one of all
    assert gemma.attention == 12 * 32 * (8 + 32)
    _, mamba = flops(family("mamba2"))
    assert mamba.attention == 0
    model, experts = flops(family("qwen3_moe"))
    idle = 2 * 2 * 3 * 16 * 32  # two of the four experts of each of two layers
    table = 61 * 32  # the embedding, which is not the head
    assert experts.parameters == 6 * (count_parameters(model) - idle - table)


@pytest.mark.parametrize(
    ("fields", "wrong", "right"),
    [
        ("{model_type: olmo2, num_hiden_layers: 1}", "num_hiden_layers", "num_hidden_layers"),
        ("{model_type: gpt2, n_layers: 2}", "n_layers", "n_layer"),
    ],
)
def test_a_misspelt_field_is_refused_wherever_it_stands(fields, wrong, right):
    expected = f"{wrong} is no field of model_type=.*; did you mean {right}"
    with pytest.raises(ValueError, match=expected):
        CausalLMConfig(config=ConfigFields.parse(fields))
    changes = {wrong: 1}
    with pytest.raises(ValueError, match=expected):
        CausalLMConfig(
            config=ConfigFields.parse(fields.split(",")[0] + "}"), changes=ConfigFields(changes)
        )


def test_a_field_that_only_other_tools_know_is_kept():
    CausalLMConfig(config=ConfigFields(model_type="llama", rope_theta=1e4, my_own_note="x"))


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "olmo2", "hidden_size": 30, "num_attention_heads": 4},
        {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 0},
    ],
)
def test_a_shape_that_transformers_cannot_run_is_refused_in_one_line(fields):
    small = {"num_hidden_layers": 1, "intermediate_size": 32}
    with pytest.raises(ValueError, match="^model.config") as error:
        check_model(CausalLMConfig(config=ConfigFields(fields | small)), document_masking=False)
    assert "\n" not in str(error.value)
