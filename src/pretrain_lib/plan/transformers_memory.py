"""Find what a model of transformers keeps for backward, by a forward pass without numbers.

The tensors of that pass have shapes and types but no content (torch's FakeTensorMode), so it takes
neither memory nor a GPU, and seconds whatever the size of the model. Its operators are those of a
CPU, which keep nearly the same as those of a GPU.
"""

from functools import cache

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pretrain_lib.models.transformers_config import CausalLMConfig
from pretrain_lib.models.transformers_flops import count_experts
from pretrain_lib.models.transformers_head import find_body

FP32 = 4  # bytes


def kept_bytes(config: CausalLMConfig, *, sequences: int, length: int, low: bool) -> int:
    """Return the bytes that the body of a model keeps for backward, with copies of its weights.

    `sequences` and `length` (tokens) are those of a micro-batch; `low` is bf16 under autocast.
    Mixtures of experts are computed wholly in bf16, the only type of which torch knows the shapes.
    """
    return _kept_bytes(config.key, sequences, length, low)


@cache
def _kept_bytes(key: str, sequences: int, length: int, low: bool) -> int:
    from transformers import AutoModelForCausalLM

    hf = CausalLMConfig.from_key(key).hf
    dtype = torch.float32 if count_experts(hf) is None else torch.bfloat16
    autocast = torch.autocast("cpu", enabled=low and dtype is torch.float32, cache_enabled=False)
    with FakeTensorMode(), autocast:
        model = AutoModelForCausalLM.from_config(hf, dtype=dtype).train()
        ids = torch.zeros(sequences, length, dtype=torch.int64)
        return _saved_bytes(model, ids)


def _saved_bytes(model: nn.Module, ids: torch.Tensor) -> int:
    """Return the bytes of the storages that a forward saves, those of weights left out."""
    weights = [*model.parameters(), *model.buffers()]
    known = {tensor.untyped_storage()._cdata for tensor in weights}
    storages = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = find_body(model)[1](input_ids=ids, use_cache=False)
    assert output.last_hidden_state.requires_grad, "nothing is kept without gradients"
    return sum(storage.nbytes() for storage in storages.values())


def token_bytes(block: nn.Module, width: int, low: int) -> tuple[int, int]:
    """Return bytes a token: kept under selective checkpointing, and working space of backward.

    From the linear layers of a block alone. `width` is that of a hidden state, `low` the bytes of a
    number in the precision of the matrix products.
    """
    outputs = [child.weight.shape[0] for child in block.modules() if isinstance(child, nn.Linear)]
    # The residual stream, what the layers write, and what attention writes.
    selected = FP32 * width + low * (sum(outputs) + width)
    return selected, FP32 * width + low * max(outputs, default=width)
