"""What a family of transformers does: which modules are its blocks, what its tokens attend to.

Whether a family can be trained is found by running a small copy of the model: few ids, and no more
layers than it has kinds of them.
"""

import copy
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import nn

from pretrain_lib.models.transformers_cache import TransformersCache, cache_name
from pretrain_lib.models.transformers_config import CausalLMConfig, needs_padding, unset_token
from pretrain_lib.models.transformers_head import find_body
from pretrain_lib.values import show
from pretrain_lib.wording import in_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

IDS, TOKENS = 16, 8  # vocabulary and sequence of the small copy
FEWEST_LAYERS = 2
# What a class of transformers raises for a shape or an argument that does not fit it.
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, ArithmeticError, LookupError)
TOLERANCE = 1e-5  # relative, of hidden states that must not depend on a token

# How the families call the number of their experts, and of those that each token uses.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k")


def find_blocks(model: "PreTrainedModel") -> list[nn.Module]:
    """Return the blocks of a model of transformers: the modules of its longest list of modules."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len, default=()))


def count_experts(hf: "PreTrainedConfig") -> tuple[int, float] | None:
    """Return the number of experts and the share that a token uses; None if there are none."""
    counts = [
        next((number for name in names if (number := getattr(hf, name, None))), None)
        for names in (EXPERTS, CHOSEN_EXPERTS)
    ]
    number, chosen = counts
    return (number, chosen / number) if number and chosen else None


def check_causal(config: CausalLMConfig) -> None:
    """Raise ValueError if transformers cannot run the model, or a token attends to later ones."""
    if not _answer(_is_causal, config):
        raise ValueError(
            f"model.config: tokens of {config.model_type} attend to later ones, so it cannot learn "
            f"to predict them; where it has one, set its option (--model.changes "
            f"'{{is_decoder: true}}')"
        )


def check_is_model(model: object) -> None:
    """Raise ValueError for anything but a model of transformers."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"model is {show(model) if isinstance(model, str) else type(model).__name__}, it must "
            f"be a model of transformers, as AutoModelForCausalLM.from_pretrained loads it; models "
            f"of pretrain_lib need no adapter"
        )


def check_class(model: nn.Module, config: CausalLMConfig) -> None:
    """Raise ValueError for another class of transformers, such as a body or a classifier."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    expected = MODEL_FOR_CAUSAL_LM_MAPPING[type(config.hf)]
    if not isinstance(model, expected):
        raise ValueError(
            f"{type(model).__name__} is not the causal language model of its family: give a "
            f"{expected.__name__}, as AutoModelForCausalLM builds it"
        )


def check_documents(config: CausalLMConfig) -> None:
    """Raise ValueError if tokens attend beyond a document whose positions restart."""
    if not _answer(_keeps_documents_apart, config):
        raise ValueError(
            f"{config.model_type} does not keep documents apart: its tokens attend beyond a "
            f"document whose positions restart; train it with data.document_masking=false"
        )


def runs_with_cache(config: CausalLMConfig) -> bool:
    """Return whether the tokens of a family can be read one after another, with its cache."""
    with torch.device("cpu"):
        return _runs_with_cache(config.key)


def _answer(question: Callable[[str], bool], config: CausalLMConfig) -> bool:
    """Return what a small copy of a model tells; ValueError if transformers cannot run it."""
    with torch.device("cpu"):  # also where a model is built on the meta device
        try:
            return question(config.key)
        except FAILURES as error:
            if _runs(config.key, padding=0) and not _runs(config.key, padding=None):
                raise needs_padding(config.model_type) from error
            reason = in_line(error) or type(error).__name__
            raise ValueError(
                f"model.config: transformers cannot run this {config.model_type} ({reason}); see "
                f"whether its numbers of heads and widths divide"
            ) from error


def _runs(key: str, *, padding: int | None) -> bool:
    """Return whether transformers runs a small copy of a model with this id for padding."""
    try:
        _hidden(_small_copy(key, padding=padding), torch.arange(TOKENS)[None])
    except FAILURES:
        return False
    return True


@cache
@torch.no_grad()
def _runs_with_cache(key: str) -> bool:
    _, body = find_body(_small_copy(key))
    if cache_name(body) is None:
        return False
    key_values, ids = TransformersCache(rows=1, slots=TOKENS), torch.arange(TOKENS)[None]
    try:
        for part in (ids[:, :-1], ids[:, -1:]):
            key_values.run(body, part)
            key_values.advance(part.shape[1])
    except FAILURES:  # as where no layer has attention, whose cache counts the tokens
        return False
    return True


@cache
def _is_causal(key: str) -> bool:
    model, ids = _small_copy(key), torch.arange(TOKENS)[None]
    changed = ids.clone()
    changed[:, TOKENS // 2 :] += TOKENS
    return _same(*(_hidden(model, x)[:, : TOKENS // 2] for x in (ids, changed)))


@cache
def _keeps_documents_apart(key: str) -> bool:
    model, ids = _small_copy(key), torch.arange(TOKENS)[None]
    half = TOKENS // 2
    changed = ids.clone()
    changed[:, :half] += TOKENS
    positions = torch.arange(half).repeat(2)[None]
    try:
        one, other = (_hidden(model, x, position_ids=positions)[:, half:] for x in (ids, changed))
    except TypeError:  # a family without positions
        return False
    alone = _hidden(model, ids[:, half:])
    return _same(one, other) and _same(one, alone)


@torch.no_grad()
def _hidden(model: "PreTrainedModel", ids: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
    _, body = find_body(model)
    return body(input_ids=ids, use_cache=False, **options).last_hidden_state


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float((one - other).abs().max()) <= TOLERANCE * float(one.abs().max())


def _small_copy(key: str, *, padding: int | None = None) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    hf = CausalLMConfig.from_key(key).hf
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(_reduce(hf, padding), dtype=torch.float32).eval()


def _reduce(hf: "PreTrainedConfig", padding: int | None) -> "PreTrainedConfig":
    """Return a configuration with few ids, and with fewer layers where all layers are alike."""
    small = copy.deepcopy(hf)
    small.vocab_size = IDS
    for name in ("bos_token_id", "eos_token_id"):
        unset_token(small, name)
    small.pad_token_id = padding
    if (layers := _layers_needed(hf)) < hf.num_hidden_layers:
        kinds = (getattr(hf, "layer_types", None) or [])[:layers]
        fewer = copy.deepcopy(small)
        fewer.num_hidden_layers = layers
        if kinds:
            with suppress(AttributeError):  # some families derive them from the number of layers
                fewer.layer_types = kinds
        return fewer if (getattr(fewer, "layer_types", None) or []) == kinds else small
    return small


def _layers_needed(hf: "PreTrainedConfig") -> int:
    """Return how many of the first layers have all kinds of layers among them."""
    from transformers import AutoModelForCausalLM

    if kinds := getattr(hf, "layer_types", None):
        return max(FEWEST_LAYERS, max(kinds.index(kind) for kind in set(kinds)) + 1)
    with torch.device("meta"):
        blocks = find_blocks(AutoModelForCausalLM.from_config(hf, dtype=torch.float32))
    shapes = [[tuple(p.shape) for p in block.parameters()] for block in blocks]
    alike = all(shape == shapes[0] for shape in shapes)
    return FEWEST_LAYERS if alike else hf.num_hidden_layers
