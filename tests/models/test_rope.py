"""Rotary scaling: logits of transformers both ways, training, generation with a cache, refusals."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from pretrain_lib import LlamaConfig, generate, save_pretrained
from pretrain_lib.models.hf import build_model, load_pretrained
from pretrain_lib.models.rope import RopeScaling, rotary_angles

CONTEXT = 256
SHAPE = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": None,
}
ORIGINAL = {"original_max_position_embeddings": 64}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} | ORIGINAL
SCALINGS = {
    "linear": ({"factor": 4.0}, RopeScaling("linear", 4.0)),
    "dynamic": ({"factor": 4.0}, RopeScaling("dynamic", 4.0)),
    "llama3": ({"factor": 8.0} | LLAMA3, RopeScaling("llama3", 8.0, 64)),
    "yarn": ({"factor": 4.0} | ORIGINAL, RopeScaling("yarn", 4.0, 64)),
    "yarn, all set": (
        {"factor": 4.0, "beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.3} | ORIGINAL,
        RopeScaling("yarn", 4.0, 64, beta_fast=8.0, beta_slow=2.0, attention_factor=1.3),
    ),
    "yarn, no length": ({"factor": 4.0}, RopeScaling("yarn", 4.0, CONTEXT)),
}


@pytest.fixture
def theirs(name):
    torch.manual_seed(0)
    kind = {"rope_type": name.split(",")[0], "rope_theta": 5000.0}
    rope = {"rope_parameters": kind | SCALINGS[name][0]}
    model = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SHAPE, **rope)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # or attention would hardly depend on the position
    return model


@torch.no_grad()
def logits(model):
    ids = torch.randint(61, (2, CONTEXT), generator=torch.Generator().manual_seed(0))
    found = model(ids)
    return found if isinstance(found, torch.Tensor) else found.logits


@pytest.mark.parametrize("name", SCALINGS)
def test_both_ways_the_logits_are_those_of_transformers(name, theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs").eval()
    assert ours.config.rope_scaling == SCALINGS[name][1]
    assert ours.config.rope_theta == 5000.0
    expected = logits(theirs)
    scale = float(expected.abs().max())
    assert float((logits(ours) - expected).abs().max()) < 1e-5 * scale
    plain = build_model(LlamaConfig(**vars(ours.config) | {"rope_scaling": None})).eval()
    plain.load_state_dict(ours.state_dict())
    changes = name != "dynamic"  # which does nothing within the context
    assert (float((logits(plain) - expected).abs().max()) > 1e-2 * scale) == changes
    save_pretrained(ours, tmp_path / "ours", tokenizer=None)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert float((logits(again) - expected).abs().max()) < 1e-5 * scale
    assert load_pretrained(tmp_path / "ours").config == ours.config


@pytest.mark.parametrize("name", ["linear", "llama3", "yarn"])
def test_gradients_and_cached_generation_are_those_of_transformers(name, theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path).train()
    ids = torch.randint(61, (2, 96), generator=torch.Generator().manual_seed(1))
    loss, targets = ours(ids[:, :-1], ids[:, 1:])
    (loss / targets).backward()
    theirs(input_ids=ids, labels=ids).loss.backward()
    expected = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    for key, parameter in ours.named_parameters():
        grad, scale = parameter.grad[: len(expected[key])], float(expected[key].abs().max())
        torch.testing.assert_close(grad, expected[key], rtol=0, atol=1e-4 * scale)
    prompt = ids[:1, :80].tolist()
    options = {"new_tokens": 16, "context_length": CONTEXT, "temperature": 0}
    found = generate(ours.eval(), prompt, **options)[0][-16:]
    written = theirs.generate(torch.tensor(prompt), max_new_tokens=16, do_sample=False)
    assert found == written[0, -16:].tolist()


def test_linear_scaling_is_that_of_positions():
    positions = torch.arange(0, 40, 4)[None]
    scaled = rotary_angles(positions, 16, 10_000.0, RopeScaling("linear", 4.0))
    plain = rotary_angles(positions // 4, 16, 10_000.0)
    for found, expected in zip(scaled, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "longrope"}, "kind=longrope must be linear, llama3, yarn or dynamic"),
        ({"factor": 0.5}, "factor=0.5 must be a number of at least 1"),
        ({"beta_fast": 2.0}, "beta_fast=2.0 has no meaning for linear"),
        ({"kind": "yarn"}, "original_context_length must be given for yarn"),
        (
            {"kind": "llama3", "original_context_length": 8, "low_frequency_factor": 4.0},
            "low_frequency_factor=4.0 must be below",
        ),
    ],
)
def test_settings_without_a_meaning_are_refused(values, message):
    with pytest.raises(ValueError, match=f"model.rope_scaling.{message}"):
        RopeScaling(**{"kind": "linear", "factor": 4.0} | values)
