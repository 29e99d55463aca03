"""Twenty steps of training equal a plain PyTorch loop over transformers' models."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from pretrain_lib.models.any_model import build_model, save_pretrained
from pretrain_lib.models.gpt2 import GPT2Config
from pretrain_lib.models.llama import LlamaConfig
from pretrain_lib.optim.groups import build_adamw

SHAPE = {"vocabulary_size": 97, "context_length": 32, "num_layers": 2, "num_heads": 4, "width": 32}
CONFIGS = {
    "gpt2": GPT2Config(**SHAPE),
    "llama": LlamaConfig(**SHAPE, num_key_value_heads=2, mlp_width=80),
    "tied llama": LlamaConfig(**SHAPE, num_key_value_heads=4, mlp_width=80, tied_head=True),
    "qwen3": LlamaConfig(
        **SHAPE, num_key_value_heads=2, mlp_width=80, head_width=12, qk_norm=True, tied_head=True
    ),
}


def batches(steps):
    """Return ids (B, T) whose next token is likely a function of the last, so that they train."""
    generator = torch.Generator().manual_seed(0)
    successor = torch.randperm(97, generator=generator)
    for _ in range(steps):
        ids = torch.randint(97, (4, 32), generator=generator)
        for t in range(1, 32):
            follow = torch.rand(4, generator=generator) < 0.8
            ids[:, t] = torch.where(follow, successor[ids[:, t - 1]], ids[:, t])
        yield ids


def train_ours(model):
    optimizer = build_adamw(model, learning_rate=3e-3)
    for ids in batches(20):
        loss, count = model(ids[:, :-1], ids[:, 1:])
        mean = loss / count
        mean.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield mean.item()


def train_theirs(model):
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    spared = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": spared, "weight_decay": 0.0}],
        lr=3e-3,
        betas=(0.9, 0.95),
        eps=1e-8,
        fused=False,
    )
    for ids in batches(20):
        logits = model(input_ids=ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_equal_those_of_transformers_and_plain_adamw(name, tmp_path):
    ours = build_model(CONFIGS[name]).initialize(0)
    save_pretrained(ours, tmp_path, tokenizer=None)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).train()
    our_losses, their_losses = list(train_ours(ours)), list(train_theirs(theirs))
    assert our_losses == pytest.approx(their_losses, abs=1e-4)
    assert our_losses[-1] < our_losses[0] - 0.5
