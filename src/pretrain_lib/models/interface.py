"""What the rest of the library asks of a model: `GPT2`, `Llama` and `CausalLMAdapter` have it.

What depends on the kind of model beyond that (its files, its cache) is in `any_model`, in functions
that take any of the three. Shapes: B sequences, T positions, D width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from pretrain_lib.models.blocks import TrainingOptions

WRAPPERS = (DataParallel, DistributedDataParallel)
COMPILED = "_orig_mod"  # the name of a module in what torch.compile returns for it


class Shape(Protocol):
    """The configuration of a model, as far as the library reads it."""

    vocabulary_size: int
    """Ids of the vocabulary."""
    padded_vocabulary_size: int
    """Rows of the embedding table; those beyond the vocabulary are no ids."""
    context_length: int
    """The longest sequence in tokens."""
    num_layers: int
    num_heads: int
    width: int

    def with_vocabulary_size(self, size: int) -> "Shape":
        """Return the same shape for another vocabulary."""


class Model(Protocol):
    """A causal language model, an `nn.Module`."""

    config: Shape
    options: TrainingOptions
    training: bool
    has_plain_head: bool
    """Whether logits are hidden states times `head_weight`; otherwise there is `logits(hidden)`."""

    @property
    def head_weight(self) -> torch.Tensor:
        """The weight (V_padded, D) of the output projection."""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The transformer blocks, each of which FSDP2 shards and torch compiles by itself."""

    def __call__(
        self,
        input_ids: torch.Tensor,
        targets: torch.Tensor | None = None,
        document_ends: torch.Tensor | None = None,
        cache: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
        """Return `(summed loss in nats, number of targets)`, or logits (B, T, V) without targets.

        `document_ends` (B, E), or (1, E) for all rows, enables document masking: each token attends
        to those of its own document. It ascends along E and holds the index after each document's
        last token. Tokens after the last end are one more document; rows with fewer ends are filled
        up with T or more. `cache` is one from `any_model.new_cache`, not given together with it.
        """

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        document_ends: torch.Tensor | None = None,
        cache: Any = None,
    ) -> torch.Tensor:
        """Return the hidden states (B, T, D) that the output projection takes."""

    def initialize(self, seed: int) -> "Model":
        """Initialize the weights, or the local shards of them, identically on every machine."""

    def to_empty(self, *, device: torch.device | str) -> "Model":
        """Move a model from the meta device to another, with arbitrary values."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield all parameters by name; shared ones once."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield all parameters."""

    def train(self, mode: bool = True) -> "Model":
        """Set the training mode."""

    def eval(self) -> "Model":
        """Set the evaluation mode."""


def saved_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what the weights of a folder hold: parameters, shared ones once, and saved buffers."""
    shared = dict(model.named_parameters(remove_duplicate=False))
    buffers = {name: t for name, t in model.state_dict().items() if name not in shared}
    return {name: p.detach() for name, p in model.named_parameters()} | buffers


def unwrap(model: nn.Module) -> Model:
    """Return the model inside the wrappers of DDP and torch.compile; one without them as it is.

    Raises ValueError for a module that is none of the three, or that has compiled modules inside,
    whose weights have other names.
    """
    while isinstance(model, WRAPPERS) or COMPILED in model._modules:
        model = model._modules[COMPILED if COMPILED in model._modules else "module"]
    # Other wrappers, such as FSDP1, pass on what they lack, but their type does not have it.
    of_type = ("blocks", "head_weight", "hidden_states", "initialize")
    missing = [name for name in ("config", "options") if not hasattr(model, name)]
    missing += [name for name in of_type if not hasattr(type(model), name)]
    if missing:
        raise ValueError(
            f"the library takes GPT2, Llama or CausalLMAdapter, not {type(model).__name__} (it has "
            f"no {', '.join(missing)}): wrap a class of transformers in CausalLMAdapter, or write "
            f"a loop around train_step, which takes any module (docs/library.md)"
        )
    if name := next((n for n, m in model.named_modules() if COMPILED in m._modules), None):
        raise ValueError(
            f"{name} is wrapped by torch.compile, which renames its weights: compile it in place "
            f"with {name}.compile(), or all blocks with set_up_model"
        )
    return model
