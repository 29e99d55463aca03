"""A class of one's own, registered with transformers, is trained as one of its own classes is."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from pretrain_lib import (
    CausalLMAdapter,
    CausalLMConfig,
    build_model,
    load_pretrained,
    open_corpus,
    start_accelerator,
    train,
)
from tests.conftest import VOCABULARY, change, read_rows, small_recipe


class OwnConfig(PreTrainedConfig):
    model_type = "own_gru"

    def __init__(self, vocab_size=61, hidden_size=16, num_hidden_layers=2, **others):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers, self.max_position_embeddings = num_hidden_layers, 64
        super().__init__(**others)


class OwnModel(PreTrainedModel):
    config_class, base_model_prefix = OwnConfig, "model"

    def __init__(self, config):
        super().__init__(config)
        width, layers = config.hidden_size, range(config.num_hidden_layers)
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.layers = nn.ModuleList(nn.GRU(width, width, batch_first=True) for _ in layers)
        self.post_init()

    def forward(self, input_ids, use_cache=False):
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = x + layer(x)[0]
        return BaseModelOutput(last_hidden_state=x)


class OwnForCausalLM(PreTrainedModel):
    config_class, base_model_prefix = OwnConfig, "model"

    def __init__(self, config):
        super().__init__(config)
        self.model = OwnModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, use_cache=False):
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids)[0]))


@pytest.fixture
def unregistered(monkeypatch):
    """Undo after a test what it registers."""
    for mapping in (CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        monkeypatch.setattr(mapping, "_extra_content", {})


@pytest.fixture
def registered(unregistered):
    AutoConfig.register("own_gru", OwnConfig)
    AutoModelForCausalLM.register(OwnConfig, OwnForCausalLM)


def test_a_registered_class_has_the_fused_loss(registered):
    torch.manual_seed(0)
    own = OwnForCausalLM(OwnConfig())
    model, ids = CausalLMAdapter(own), torch.randint(61, (2, 9))
    loss, count = model(ids[:, :-1], ids[:, 1:])
    logits = own(input_ids=ids[:, :-1]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected)
    assert model.has_plain_head and count == 16


def test_a_run_of_a_registered_class_is_loaded_again(registered, prepared, tmp_path):
    config = CausalLMConfig(config={"model_type": "own_gru", "vocab_size": VOCABULARY})
    recipe = change(small_recipe(prepared, tmp_path), schedule={"tokens": 4 * 256})
    recipe = dataclasses.replace(recipe, model=config)
    recipe.check(processes=1)
    corpus, accelerator = open_corpus(recipe), start_accelerator(recipe)
    with torch.device("meta"):
        model = build_model(config)
    train(recipe, model, corpus, accelerator)
    losses = [row["loss"] for row in read_rows(recipe.run.dir) if row["kind"] == "train"]
    assert len(losses) == 4 and losses[-1] < losses[0]
    again = load_pretrained(Path(recipe.run.dir) / "checkpoints" / "step-00000004")
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_class_that_is_not_registered_is_refused_with_the_remedy(unregistered):
    own = OwnForCausalLM(OwnConfig())
    with pytest.raises(ValueError, match=r"own_gru is unknown .* AutoConfig\.register$"):
        CausalLMAdapter(own)
    AutoConfig.register("own_gru", OwnConfig)
    with pytest.raises(ValueError, match=r"no causal .* AutoModelForCausalLM\.register$"):
        CausalLMAdapter(own)
