"""What `--plan` says that a model of transformers keeps for backward, against what it keeps."""

from dataclasses import replace

import pytest
import torch

from pretrain_lib import CausalLMConfig, build_model
from pretrain_lib.plan.memory import estimate_memory
from pretrain_lib.plan.micro_batch import Planned
from pretrain_lib.plan.network import World
from pretrain_lib.plan.step import Step
from recipes import causal_lm
from tests.families import FAMILIES, GROUPED, UNCOMMON, WITH_BUFFERS, family

pytestmark = pytest.mark.moderate

WIDE = {  # enough for the tensors of a token to outweigh what is kept once
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_heads": 8,
    "head_dim": 32,
    "ffn_dim": 512,
    "word_embed_proj_dim": 128,
    "max_position_embeddings": 128,
    "query_pre_attn_scalar": 32,
}
# Those of experts, of which torch knows the shapes in bf16 only.
EXPERTS = ("qwen3_moe", "olmoe", "inkling", "llama4", "qwen3_next", "deepseek_v4")
PLANNED = FAMILIES | UNCOMMON | {"deepseek_v4": WITH_BUFFERS["deepseek_v4"]}


def kept_by_forward(model, ids):
    """Return the bytes of the tensors that a forward saves, those of the model left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.hidden_states(ids)
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("name", PLANNED)
def test_activations_are_near_what_a_forward_keeps(name):
    changes = {key: value for key, value in WIDE.items() if key in PLANNED[name]}
    config = CausalLMConfig(config=PLANNED[name], changes=changes)
    model = build_model(config).initialize(0).train()
    ids = torch.randint(61, (2, 128), generator=torch.Generator().manual_seed(0))
    step = Step(2, 128, precision="fp32", on_cuda=False)
    told = estimate_memory(model, step).activations
    kept = kept_by_forward(model, ids)
    if name in EXPERTS:
        assert 0.5 * kept < told < kept
    else:
        assert kept <= told <= 1.15 * kept


def test_a_model_whose_forward_depends_on_numbers_is_not_planned():
    config = CausalLMConfig(config=GROUPED | {"model_type": "jetmoe", "kv_channels": 8})
    with torch.device("meta"):
        model = build_model(config)
    unknown = "the memory of jetmoe cannot be planned"
    with pytest.raises(ValueError, match=unknown):
        estimate_memory(model, Step(1, 64))
    recipe = replace(causal_lm.RECIPE, model=config)  # a run says so, and goes on
    assert unknown in Planned(recipe).memory_line(model, World(), 80)


def test_a_model_that_no_memory_would_hold_is_planned():
    changes = {"hidden_size": 16_384, "intermediate_size": 53_248, "num_hidden_layers": 12}
    changes |= {"num_attention_heads": 128, "num_key_value_heads": 8, "head_dim": 128}
    with torch.device("meta"):
        model = build_model(family("mistral", **changes, sliding_window=None))
    memory = estimate_memory(model, Step(1, 64))
    assert memory.weights == 4 * sum(p.numel() for p in model.parameters()) > 1.5e11
    kept = [
        estimate_memory(model, Step(1, 64, activation_checkpointing=kind)).activations
        for kind in ("none", "selective", "full")
    ]
    assert kept == sorted(kept, reverse=True)
