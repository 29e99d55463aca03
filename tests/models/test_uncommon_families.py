"""Families whose heads, bodies or caches are unlike others: what transformers computes of them."""

import pytest
import torch
import torch.nn.functional as F

from pretrain_lib import IGNORED_TARGET, CausalLMConfig, build_model, generate, save_pretrained
from pretrain_lib.export.check import write_expected
from pretrain_lib.export.reload import find_problems
from pretrain_lib.models.any_model import check_model, new_cache
from tests.families import FAMILIES, SMALL, UNCOMMON, family

pytestmark = pytest.mark.moderate

V = 61


@pytest.fixture(scope="module", params=[*UNCOMMON, *FAMILIES])
def model(request):
    """A model with weights large enough that no part of it is nearly nothing."""
    model = build_model(family(request.param)).initialize(0).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_logits_loss_and_gradient_are_those_of_transformers(model):
    check_model(model.config, document_masking=False)
    generator = torch.Generator().manual_seed(1)
    ids, targets = (torch.randint(V, (2, 12), generator=generator) for _ in range(2))
    targets[0, :5] = IGNORED_TARGET
    expected = model.model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(model(ids), expected, rtol=1e-5, atol=1e-5)
    loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum")
    own, count = model(ids, targets)
    assert count == 19
    assert own.item() == pytest.approx(loss.item(), rel=1e-5)
    theirs, ours = gradients(model, loss), gradients(model, own)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)


DERIVED = {  # families that derive the kinds of their layers from their number
    "mamba": {"num_attention_heads": None},
    "jamba": {"num_key_value_heads": 2, "num_experts": 2},
    "bamba": {"num_key_value_heads": 2, "attn_layer_indices": [1, 6]}
    | {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8},
    "recurrent_gemma": {"num_key_value_heads": 1},
}


@pytest.mark.parametrize("name", [*UNCOMMON, *FAMILIES, *DERIVED])
def test_a_family_is_known_from_its_first_layers_however_many_it_has(name):
    fields = DERIVED[name] | SMALL if name in DERIVED else (FAMILIES | UNCOMMON)[name]
    fields = {"model_type": name} | fields | {"num_hidden_layers": 8}
    for key, value in fields.items():
        if isinstance(value, list) and len(value) == 2 and key != "attn_layer_indices":
            fields[key] = 4 * value
    check_model(CausalLMConfig(config=fields), document_masking=False)  # or it is refused


def test_an_export_is_the_model_under_transformers(model, tmp_path):
    folder, expected = tmp_path / "folder", tmp_path / "expected"
    save_pretrained(model, folder, tokenizer=None)
    expected.mkdir()
    write_expected(model, expected, tokenizer=None, dtype=torch.float32)
    problems, difference = find_problems(folder, expected)
    assert problems == []
    assert difference <= 1e-5


def test_a_family_whose_cache_does_not_work_is_generated_without():
    model = build_model(family("qwen3_next")).initialize(0).eval()
    assert new_cache(model, rows=1, slots=10) is None
    assert new_cache(build_model(family("falcon_h1")), rows=1, slots=10) is not None
    prompt, options = [3, 1, 4, 1, 5], {"context_length": 64, "temperature": 0.0}
    (found,) = generate(model, [prompt], new_tokens=5, **options)
    with torch.no_grad():
        logits = model.model(input_ids=torch.tensor([prompt + found]), use_cache=False).logits
    assert found == logits[0, len(prompt) - 1 : -1].argmax(dim=1).tolist()


SMALL_BERT = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
NEED_PADDING = ("roberta", "camembert", "xlm-roberta", "data2vec-text", "modernbert-decoder")


@pytest.mark.parametrize("model_type", NEED_PADDING)
def test_a_family_that_needs_an_id_for_padding_is_refused_with_that_reason(model_type):
    fields = SMALL_BERT | {"model_type": model_type, "is_decoder": True}
    with pytest.raises(ValueError, match=f"^model.config: .*{model_type} needs a pad_token_id"):
        check_model(CausalLMConfig(config=fields), document_masking=False)


def test_heads_that_fit_only_without_document_masking_are_refused_in_one_line():
    config = family("minicpm3", num_key_value_heads=2, v_head_dim=16)
    check_model(config, document_masking=False)
    with pytest.raises(ValueError, match=r"^model.config: transformers cannot run") as error:
        check_model(config, document_masking=True)
    assert "\n" not in str(error.value)
