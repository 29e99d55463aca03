"""The output head of a model of transformers, apart from its body.

Many families do more to the logits than to multiply hidden states by a matrix: they scale or cap
them. Their own `forward` is called on hidden states that are already there, so whatever a family
does is done. Shapes: N hidden states, D width, V vocabulary.
"""

import copy
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pretrain_lib.data.windows.packing import IGNORED_TARGET
from pretrain_lib.models.loss import chunk_rows
from pretrain_lib.models.token_ids import flatten_checked

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE = (-1e3, 1e3)  # range of the numbers by which scaling and capping are found


class TransformersHead:
    """What a causal language model of transformers does to the hidden states of its body.

    It shares the parameters of `model` and is no module, so that they belong to `model` alone.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        name, body = find_body(model)
        self._body = _Given(body)
        self._head = _replaced(model, {name: self._body})

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits (1, N, V) of hidden states (1, N, D)."""
        return self._call(hidden, _Output(last_hidden_state=hidden)).logits

    def router_loss(self, output: Any) -> torch.Tensor:
        """Return the load-balancing loss of the mixture of experts, (), for an output of the body.

        `output` must have been computed with `output_router_logits`.
        """
        hidden = output.last_hidden_state[:1, :1]
        given = _Output(last_hidden_state=hidden, router_logits=output.router_logits)
        return self._call(hidden, given, output_router_logits=True).aux_loss

    def _call(self, hidden: torch.Tensor, output: "_Output", **options: bool) -> Any:
        self._body.output = output
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        options = {"output_router_logits": False} | options
        supported = {
            name: value for name, value in options.items() if hasattr(self._head.config, name)
        }
        return self._head(input_ids=ids, use_cache=False, **supported)


class _Output(SimpleNamespace):
    """An output of a body, in which everything that was not given is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, index: int) -> Any:
        """Return the hidden states, as the first entry of every output of transformers."""
        return self.last_hidden_state if index == 0 else None


class _Given(nn.Module):
    """Stands for the body of a model, and returns the output that it was given."""

    output: _Output | None = None

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        vars(self)["body"] = body  # not as a submodule: it belongs to its model

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the body, such as a scale that the model applies to its logits."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(vars(self)["body"], name)

    @property
    def decoder(self) -> "_Given":
        """OPT calls its body by that name."""
        return self

    def forward(self, *args: Any, **options: Any) -> _Output | None:
        return self.output


class _GivenLogits(nn.Module):
    """Stands for the output projection of a model, and returns the logits that it was given.

    They are not a number if the projection is called on other hidden states than those of the body.
    """

    def __init__(self, hidden: torch.Tensor, logits: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden
        self.given = logits
        self.weight = logits.new_zeros(1)  # some families ask for its dtype

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        is_as_given = torch.equal(hidden, self.hidden)
        return self.given if is_as_given else torch.full_like(self.given, torch.nan)


def is_plain_head(model: "PreTrainedModel") -> bool:
    """Return whether the logits are the hidden states times a matrix, and nothing more.

    Neither weights nor arithmetic are needed for it, so `model` may be on the meta device.
    """
    head = model.get_output_embeddings()
    # A subclass of nn.Linear, too, may do more than to multiply.
    if getattr(type(head), "forward", None) is not nn.Linear.forward or head.bias is not None:
        return False
    names = [name for name, module in model._modules.items() if module is head]
    if len(names) != 1:
        return False
    with torch.no_grad(), torch.device("cpu"):
        hidden, expected = (
            torch.linspace(*PROBE, 4 * width).view(1, 4, width)
            for width in (head.in_features, head.out_features)
        )
        body_name, body = find_body(model)
        stand_in = _Given(body)
        stand_in.output = _Output(last_hidden_state=hidden)
        probe = _replaced(model, {names[0]: _GivenLogits(hidden, expected), body_name: stand_in})
        logits = probe(input_ids=torch.zeros(1, 4, dtype=torch.int64), use_cache=False).logits
        return logits.shape == expected.shape and torch.equal(logits.float(), expected)


def find_body(model: "PreTrainedModel") -> tuple[str, nn.Module]:
    """Return the name and the submodule of a causal language model that makes hidden states."""
    from transformers import PreTrainedModel

    name = model.base_model_prefix
    if name in model._modules:
        return name, model._modules[name]
    # A family whose prefix is that of a larger model; without a body it has no last hidden state.
    bodies = ((n, m) for n, m in model.named_children() if isinstance(m, PreTrainedModel))
    return next(bodies, ("", model))


def _replaced(model: nn.Module, modules: dict[str, nn.Module]) -> nn.Module:
    """Return a model that has some of its submodules replaced and shares the others."""
    copied = copy.copy(model)
    copied._modules = model._modules | modules
    return copied


def chunked_loss(
    head: TransformersHead,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocabulary_size: int,
    z_loss: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `linear_cross_entropy` returns, for any head.

    `hidden` (..., D), `targets` (...). The logits are made in chunks of rows, and once more in
    backward, so that those of a batch never exist at once.
    """
    hidden, targets, factor = flatten_checked(hidden, targets, vocabulary_size)
    row_bytes = vocabulary_size * torch.float32.itemsize
    rows = chunk_rows(len(hidden), row_bytes, hidden.device.type)
    loss = hidden.new_zeros((), dtype=torch.float32)
    for part, part_targets in zip(hidden.split(rows), targets.split(rows), strict=True):
        arguments = head, part, part_targets, z_loss
        if torch.is_grad_enabled():
            loss = loss + checkpoint(chunk_loss, *arguments, use_reentrant=False)
        else:
            loss = loss + chunk_loss(*arguments)
    return loss * factor, (targets != IGNORED_TARGET).sum()


def chunk_loss(
    head: TransformersHead, hidden: torch.Tensor, targets: torch.Tensor, z_loss: float
) -> torch.Tensor:
    """Return the summed loss of a chunk, hidden states (N, D) with targets (N,)."""
    logits = head.logits(hidden[None])[0].float()  # (N, V)
    normalizer = logits.logsumexp(dim=1)
    counts = targets != IGNORED_TARGET
    picked = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    nll = normalizer - picked
    if z_loss:
        square = z_loss * normalizer**2
        nll = nll + (square - square.detach())  # in the gradient alone, as `linear_cross_entropy`
    return (nll * counts).sum()
