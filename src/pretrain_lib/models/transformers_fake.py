"""A model of transformers without numbers, by whose forward pass its costs are found.

Its tensors have shapes and types but no content (torch's FakeTensorMode), so that a pass takes
neither memory nor a GPU, and seconds whatever the size of the model. Its operators are those of a
CPU.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from pretrain_lib.models.transformers_config import CausalLMConfig
from pretrain_lib.models.transformers_family import FAILURES, TOKENS, count_experts
from pretrain_lib.models.transformers_head import find_body

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

NEEDS_NUMBERS = (DataDependentOutputException, DynamicOutputShapeException)


@dataclass(frozen=True)
class Calls:
    """How often a forward pass in training calls the modules of a model, by their names."""

    kept: Counter[str] = field(default_factory=Counter)
    """Calls with gradients."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Calls without, as the first loops of some models."""

    def passes(self, name: str) -> float:
        """Return the calls of a module in passes forward and backward; a forward alone is 1/3."""
        return self.kept[name] + self.dropped[name] / 3


@contextmanager
def fake_model(hf: "PreTrainedConfig", dtype: torch.dtype) -> Iterator["PreTrainedModel"]:
    """Give a model in training mode; inside, all tensors are without numbers."""
    from transformers import AutoModelForCausalLM

    # Not inside the mode, where torch cannot change the type of a weight, as some families do.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf, dtype=dtype).train()
    fakes = {}
    with FakeTensorMode(), torch.device("cpu"), torch.enable_grad():
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None and tensor not in fakes:
                        fakes[tensor] = _fake(tensor)
                    tensors[name] = fakes.get(tensor)  # one for weights that are tied
        yield model


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
    is_weight = isinstance(tensor, nn.Parameter)
    return nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_weight else fake


def body_dtype(hf: "PreTrainedConfig") -> torch.dtype:
    """Return the type for a body; of experts, torch knows the shapes in bf16 only."""
    return torch.float32 if count_experts(hf) is None else torch.bfloat16


def count_calls(config: CausalLMConfig) -> Calls:
    """Return how often a forward pass calls each module; no calls if it depends on numbers."""
    return _count_calls(config.key)


@cache
def _count_calls(key: str) -> Calls:
    calls, hf = Calls(), CausalLMConfig.from_key(key).hf
    try:
        with fake_model(hf, body_dtype(hf)) as model:
            for name, module in model.named_modules():
                module.register_forward_pre_hook(_counter(calls, name))
            find_body(model)[1](
                input_ids=torch.zeros(1, TOKENS, dtype=torch.int64), use_cache=False
            )
    except FAILURES:
        return Calls()
    return calls


def _counter(calls: Calls, name: str) -> Callable[[nn.Module, tuple], None]:
    def count(_module: nn.Module, _args: tuple) -> None:
        (calls.kept if torch.is_grad_enabled() else calls.dropped)[name] += 1

    return count
