"""Faults planted in an export, each found by its own check, which passes without them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain_lib import GPT2Config, LlamaConfig, check_export, save_pretrained
from pretrain_lib.data.text.tokenizer import load_tokenizer, train_tokenizer
from pretrain_lib.export import export
from pretrain_lib.export.check import write_expected
from pretrain_lib.export.export import export_checkpoint
from pretrain_lib.export.reload import find_problems
from pretrain_lib.models.hf import build_model
from pretrain_lib.models.rope import RopeScaling
from tests.conftest import python_path

pytestmark = pytest.mark.moderate

VOCABULARY = 300
SHAPE = {"vocabulary_size": VOCABULARY, "context_length": 48, "num_layers": 2, "num_heads": 4}
GROUPED = SHAPE | {"num_key_value_heads": 2, "mlp_width": 80, "width": 32}
CONFIGS = {
    "gpt2": GPT2Config(**SHAPE, width=32),
    "llama": LlamaConfig(**GROUPED, rope_theta=500.0, norm_epsilon=1e-6),
    "tied llama": LlamaConfig(
        **GROUPED, tied_head=True, rope_scaling=RopeScaling("llama3", 4.0, 16)
    ),
    "qwen3": LlamaConfig(**GROUPED, head_width=12, qk_norm=True),
}


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["some words to learn from, " * 9, "Once upon a time there were others: été 🙂"]
    trained = train_tokenizer(texts * 9, vocabulary_size=VOCABULARY)
    assert trained.vocabulary_size == VOCABULARY
    return trained


@pytest.fixture(scope="module")
def written(tokenizer, tmp_path_factory):
    """A folder of each model, and what is expected of it."""
    folder = tmp_path_factory.mktemp("written")
    for name, config in CONFIGS.items():
        model = build_model(config).initialize(0)
        save_pretrained(model, folder / name / "model", tokenizer=tokenizer)
        (folder / name / "expected").mkdir()
        options = {"tokenizer": tokenizer, "dtype": torch.float32}
        write_expected(model, folder / name / "expected", **options)
    return folder


def edit(path, **changes):
    """Change fields of a JSON file; None takes one out."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def transpose_a_square(folder):
    name = "transformer.h.1.attn.c_proj.weight"
    edit_tensors(folder, lambda t: t.update({name: t[name].t().contiguous()}))


def alter_a_norm(folder):
    name = "transformer.ln_f.bias"
    edit_tensors(folder, lambda t: t.update({name: t[name] + 1e-6}))


def leave_a_tensor_over(folder):
    edit_tensors(folder, lambda t: t.update(extra=torch.zeros(1)))


def take_the_head_out(folder):
    edit_tensors(folder, lambda t: t.pop("lm_head.weight"))


def tie_the_head(folder):
    edit(folder / "config.json", tie_word_embeddings=True)


def untie_the_head(folder):
    def add_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone() + 0.01

    edit_tensors(folder, add_head)
    edit(folder / "config.json", tie_word_embeddings=False)


def resize_vocabulary(folder, rows):
    def resize(tensors):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            padded = torch.cat([tensors[name], torch.zeros(128, 32)])
            tensors[name] = padded[:rows].contiguous()

    edit_tensors(folder, resize)
    edit(folder / "config.json", vocab_size=rows)


def cut_the_vocabulary(folder):
    resize_vocabulary(folder, VOCABULARY - 8)


def pad_the_vocabulary(folder):
    resize_vocabulary(folder, 384)


def change_bos(folder):
    edit(folder / "tokenizer_config.json", bos_token="A")


def change_bos_of_the_model(folder):
    edit(folder / "config.json", bos_token_id=5)


def add_bos_to_every_text(folder):
    template = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        },
    }
    edit(folder / "tokenizer.json", post_processor=template)


def drop_leading_spaces(folder):
    edit(folder / "tokenizer.json", normalizer={"type": "Strip", "strip_left": True} | RIGHT)


RIGHT = {"strip_right": False}


def take_rope_theta_out(folder):
    edit(folder / "config.json", rope_theta=None)


def take_rope_parameters_out(folder):
    edit(folder / "config.json", rope_theta=None, rope_parameters=None)


def take_scaling_out(folder):
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    edit(folder / "config.json", rope_scaling=None, rope_parameters=rope)


def change_the_epsilon(folder):
    edit(folder / "config.json", rms_norm_eps=1e-5)


def change_the_end(folder):
    edit(folder / "generation_config.json", eos_token_id=7)


def change_the_class(folder):
    edit(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")


def take_the_tokenizer_out(folder):
    (folder / "tokenizer.json").unlink()


FAULTS = [
    ("gpt2", transpose_a_square, ["weights transformer.h.1.attn.c_proj.weight differ"]),
    ("gpt2", alter_a_norm, ["weights transformer.ln_f.bias differ"]),
    ("gpt2", leave_a_tensor_over, ["reports unexpected keys: ['extra']"]),
    ("llama", take_the_head_out, ["reports missing keys: ['lm_head.weight']"]),
    ("llama", tie_the_head, ["tie_word_embeddings is true, not false"]),
    ("tied llama", untie_the_head, ["tie_word_embeddings is false", "logits under transformers"]),
    ("llama", cut_the_vocabulary, ["vocab_size is 292, not 300", "embed_tokens.weight, lm_head"]),
    ("llama", pad_the_vocabulary, ["vocab_size is 384, not 300", "shape (2, 48, 384), not"]),
    ("gpt2", change_bos, ['bos_token is "A", not "<|endoftext|>"', "bos_token_id=33, not 0"]),
    ("gpt2", change_bos_of_the_model, ["the loaded model has bos_token_id=5, not 0"]),
    ("llama", add_bos_to_every_text, ["post_processor is", "the text '' has the ids [0], not []"]),
    ("gpt2", drop_leading_spaces, ["normalizer is", "the text ' ' has the ids []"]),
    ("llama", take_rope_theta_out, ["config.json: rope_theta is missing, not 500.0"]),
    ("llama", take_rope_parameters_out, ["rope_theta is missing", "logits under transformers"]),
    ("tied llama", take_scaling_out, ["rope_scaling is missing", "logits under transformers"]),
    ("llama", change_the_epsilon, ["rms_norm_eps is 1e-05, not 1e-06"]),
    ("gpt2", change_the_end, ["generation_config.json: eos_token_id is 7, not 0"]),
    ("llama", change_the_class, ['tokenizer_class is "LlamaTokenizer"']),
    ("gpt2", take_the_tokenizer_out, ["tokenizer.json is missing"]),
]


@pytest.mark.parametrize(("name", "plant", "messages"), FAULTS, ids=[f[1].__name__ for f in FAULTS])
def test_a_planted_fault_is_found_and_named(name, plant, messages, written, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(written / name / "model", folder)
    plant(folder)
    problems = "; ".join(find_problems(folder, written / name / "expected")[0])
    for message in messages:
        assert message in problems


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_is_found_where_nothing_was_planted(name, written):
    problems, difference = find_problems(written / name / "model", written / name / "expected")
    assert problems == [] and difference < 1e-5


def test_what_only_transformers_4_would_read_otherwise_is_found(written, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(written / "llama" / "model", folder)
    take_rope_theta_out(folder)
    (problem,) = find_problems(folder, written / "llama" / "expected")[0]
    assert problem == "config.json: rope_theta is missing, not 500.0"


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_every_tensor_that_is_altered_is_named(name, written, tmp_path):
    folder, generator = tmp_path / "model", torch.Generator().manual_seed(1)
    shutil.copytree(written / name / "model", folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()  # they take time
    original = load_file(folder / "model.safetensors")
    for key, tensor in original.items():
        noise = 1e-3 * torch.randn(tensor.shape, generator=generator)
        altered = original | {key: tensor + noise}
        save_file(altered, folder / "model.safetensors", metadata={"format": "pt"})
        problems, _ = find_problems(folder, written / name / "expected")
        assert f"the weights {key} differ from the model's" in problems


@pytest.mark.slow
def test_the_check_runs_in_a_process_of_its_own_and_keeps_the_mode(written, tokenizer):
    folder = written / "gpt2" / "model"
    model = build_model(CONFIGS["gpt2"]).initialize(0)
    assert check_export(model.train(), folder, tokenizer=tokenizer) < 1e-5
    assert model.training
    other = build_model(CONFIGS["gpt2"]).initialize(1).eval()
    with pytest.raises(ValueError, match=r"gpt2/model does not load as .* and 7 more differ"):
        check_export(other, folder, tokenizer=tokenizer)
    assert not other.training


def test_a_process_that_fails_is_told_by_its_last_line(written, tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise RuntimeError('no room')")
    monkeypatch.setenv("PYTHONPATH", python_path(tmp_path))
    folder, model = written / "gpt2" / "model", build_model(CONFIGS["gpt2"])
    with pytest.raises(ValueError, match="gpt2/model again has failed: RuntimeError: no room$"):
        check_export(model.initialize(0), folder, tokenizer=None)


@pytest.mark.slow
def test_an_export_with_a_fault_does_not_appear(written, tmp_path, monkeypatch):
    source, out = written / "gpt2" / "model", tmp_path / "out"
    shutil.copytree(source, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(export, "write_card", lambda folder, *_, **__: transpose_a_square(folder))
    with pytest.raises(ValueError, match=r"weights transformer\.h\.1\.attn\.c_proj\.weight differ"):
        export_checkpoint(source, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.slow
def test_a_tokenizer_that_begins_every_text_does_not_do_so_in_an_export(written, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(written / "llama" / "model", folder)
    add_bos_to_every_text(folder)
    assert load_tokenizer(folder).sha256 == load_tokenizer(written / "llama" / "model").sha256
    export_checkpoint(folder, tmp_path / "out")  # which compares the ids
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text())["post_processor"] is None
