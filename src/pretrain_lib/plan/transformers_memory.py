"""Find what a model of transformers keeps for backward, by a forward pass without numbers.

Its operators are those of a CPU, which keep nearly the same as those of a GPU.
"""

import weakref
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain_lib.models.adapter import CausalLMAdapter
from pretrain_lib.models.transformers_config import CausalLMConfig
from pretrain_lib.models.transformers_fake import NEEDS_NUMBERS, body_dtype, count_calls, fake_model
from pretrain_lib.models.transformers_head import TransformersHead, chunk_loss, find_body

FP32 = 4  # bytes


def kept_bytes(config: CausalLMConfig, *, sequences: int, length: int, low: bool) -> int:
    """Return the bytes that the body of a model keeps for backward, with copies of its weights.

    `sequences` and `length` (tokens) are those of a micro-batch; `low` is bf16 under autocast.
    Mixtures of experts are computed wholly in bf16, the only type of which torch knows the shapes.
    Raises ValueError for a model whose forward depends on numbers.
    """
    try:
        return _kept_bytes(config.key, sequences, length, low)
    except NEEDS_NUMBERS as error:
        raise ValueError(
            f"model.config: the memory of {config.model_type} cannot be planned, since what its "
            f"forward does depends on numbers: measure it in a short run"
        ) from error


@cache
def _kept_bytes(key: str, sequences: int, length: int, low: bool) -> int:
    hf = CausalLMConfig.from_key(key).hf
    dtype = body_dtype(hf)
    with fake_model(hf, dtype) as model, _autocast(low and dtype is torch.float32):
        return _saved_bytes(model, torch.zeros(sequences, length, dtype=torch.int64))


def _autocast(low: bool) -> torch.autocast:
    return torch.autocast("cpu", enabled=low, cache_enabled=False)


def _saved_bytes(model: nn.Module, ids: torch.Tensor) -> int:
    """Return the bytes of the storages that a forward saves, those of weights left out."""
    weights = [*model.parameters(), *model.buffers()]
    in_weights = {tensor.untyped_storage()._cdata for tensor in weights}
    storages = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in in_weights:
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = find_body(model)[1](input_ids=ids, use_cache=False)
    assert output.last_hidden_state.requires_grad, "nothing is kept without gradients"
    return sum(storage.nbytes() for storage in storages.values())


def logits_bytes(config: CausalLMConfig, *, rows: int, low: bool) -> int:
    """Return the peak bytes of a chunk of logits that a model makes itself, with their gradients.

    `rows` is the number of hidden states of the chunk; theirs and the weight's gradient count, too.
    """
    return _logits_bytes(config.key, rows, low)


@cache
def _logits_bytes(key: str, rows: int, low: bool) -> int:
    config = CausalLMConfig.from_key(key)
    with fake_model(config.hf, torch.float32) as model, _autocast(low):
        hidden = torch.zeros(rows, config.width, requires_grad=True)
        targets = torch.zeros(rows, dtype=torch.int64)
        with _Allocated() as allocated:
            chunk_loss(TransformersHead(model), hidden, targets, z_loss=0.0).backward()
    return allocated.peak


class _Allocated(TorchDispatchMode):
    """Adds up the storages that operators make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        for result in _tensors(results):
            storage = result.untyped_storage()
            if storage not in self._known and storage._cdata not in inputs:
                self._known.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return results

    def _add(self, number: int) -> None:
        self.now += number
        self.peak = max(self.peak, self.now)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def loops(model: CausalLMAdapter) -> float:
    """Return how often a forward uses each block for backward, on average; 1 without a loop."""
    kinds = tuple({type(block) for block in model.blocks})
    calls = count_calls(model.config).kept
    named = model.model.named_modules()
    count = sum(calls[name] for name, module in named if isinstance(module, kinds))
    return count / len(model.blocks) or 1


def token_bytes(block: nn.Module, width: int, low: int) -> tuple[int, int]:
    """Return bytes a token: kept under selective checkpointing, and working space of backward.

    From the linear layers of a block alone. `width` is that of a hidden state, `low` the bytes of a
    number in the precision of the matrix products.
    """
    outputs = [child.weight.shape[0] for child in block.modules() if isinstance(child, nn.Linear)]
    # The residual stream, what the layers write, and what attention writes.
    selected = FP32 * width + low * (sum(outputs) + width)
    return selected, FP32 * width + low * max(outputs, default=width)
