"""float8 training of LLaMA's blocks, through Accelerate's recipe for torchao.

The matrix products of the blocks cast both factors to float8 with one scale per tensor, which
follows from its largest element (Micikevicius et al. 2022). Embeddings, norms, the output
projection and all else compute as under bf16 autocast; weights, gradients and moments stay in fp32,
so checkpoints and exports do not change.
"""

import importlib.util
import os

import torch
from accelerate.utils import AORecipeKwargs
from torch import nn

from pretrain_lib.config.settings import Recipe
from pretrain_lib.models.llama import LlamaConfig

BACKEND = "ACCELERATE_FP8_BACKEND"  # set by the launcher, from `fp8_backend`
MULTIPLE = 16  # of both sides of a matrix: what the kernels take
CAPABILITY = (8, 9)  # the first with float8 units: Ada, Hopper


def float8_recipe(config: Recipe, *, cpu: bool) -> AORecipeKwargs:
    """Return the settings of Accelerate for `mixed_precision: fp8`; on a CPU it is emulated.

    Raises ValueError for a model, a machine or a backend that does not fit.
    """
    _check_model(config)
    if (backend := os.environ.get(BACKEND, "ao").lower()) not in ("ao", "auto", "torchao"):
        raise ValueError(f"fp8_backend={backend} is not supported: set ao, or leave it out")
    if importlib.util.find_spec("torchao") is None:
        raise ValueError("mixed_precision=fp8 needs torchao: pip install 'pretrain_lib[fp8]'")
    if not (cpu or _has_float8()):
        needed = ".".join(map(str, CAPABILITY))
        raise ValueError(
            f"mixed_precision=fp8 needs a GPU of compute capability {needed} or more, which this "
            f"device is not: set bf16"
        )
    from torchao.float8 import Float8LinearConfig

    # Sharded weights are gathered as in a run without float8, and cast where they are used.
    recipe = Float8LinearConfig(
        emulate=cpu, pad_inner_dim=True, enable_fsdp_float8_all_gather=False
    )
    return AORecipeKwargs(config=recipe, module_filter_func=in_float8)


def in_float8(module: nn.Module, name: str) -> bool:
    """Return whether a module of a model computes in float8: the matrices of the blocks."""
    return isinstance(module, nn.Linear) and not name.endswith("lm_head")


def _has_float8() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= CAPABILITY


def _check_model(config: Recipe) -> None:
    model = config.model
    if not isinstance(model, LlamaConfig):
        raise ValueError(
            "mixed_precision=fp8 is for LLaMA and Qwen3 (recipes llama_1_3b and qwen3_124m): set "
            "bf16 for this model"
        )
    key_value_width = model.attention_width * model.num_key_value_heads // model.num_heads
    sides = {
        "model.width": model.width,
        "model.mlp_width": model.mlp_width,
        "the width of all heads": model.attention_width,
        "the width of all key and value heads": key_value_width,
    }
    for name, size in sides.items():
        if size % MULTIPLE:
            raise ValueError(
                f"mixed_precision=fp8 needs matrices whose sides are multiples of {MULTIPLE}: "
                f"{name}={size}"
            )
