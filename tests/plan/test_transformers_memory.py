"""What `--plan` says that a model of transformers keeps for backward, against what it keeps."""

import pytest
import torch

from pretrain_lib import build_model
from pretrain_lib.plan.memory import estimate_memory
from pretrain_lib.plan.step import Step
from tests.families import FAMILIES, family

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
EXPERTS = ("qwen3_moe", "olmoe")  # of which torch knows the shapes in bf16 only


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


@pytest.mark.parametrize("name", FAMILIES)
def test_activations_are_near_what_a_forward_keeps(name):
    changes = {key: value for key, value in WIDE.items() if key in FAMILIES[name]}
    model = build_model(family(name, **changes)).initialize(0).train()
    ids = torch.randint(61, (2, 128), generator=torch.Generator().manual_seed(0))
    step = Step(2, 128, precision="fp32", on_cuda=False)
    told = estimate_memory(model, step).activations
    kept = kept_by_forward(model, ids)
    if name in EXPERTS:
        assert 0.5 * kept < told < kept
    else:
        assert kept <= told <= 1.15 * kept


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
