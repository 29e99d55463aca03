"""Any causal language model of transformers, with what the library asks of a model (`interface`).

Shapes: B sequences, T positions, D width, V vocabulary.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pretrain_lib.models.attention import document_positions
from pretrain_lib.models.blocks import ActivationCheckpointing, TrainingOptions, checkpoint_options
from pretrain_lib.models.loss import linear_cross_entropy
from pretrain_lib.models.places import expand_document_ends
from pretrain_lib.models.transformers_cache import TransformersCache
from pretrain_lib.models.transformers_config import CausalLMConfig, describe_hf
from pretrain_lib.models.transformers_family import (
    check_causal,
    check_class,
    check_documents,
    check_is_model,
    find_blocks,
)
from pretrain_lib.models.transformers_head import (
    TransformersHead,
    chunked_loss,
    find_body,
    is_plain_head,
)
from pretrain_lib.tensors.pieces import fill

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CausalLMAdapter(nn.Module):
    """Wraps a causal language model of transformers, with the `forward` of `GPT2`.

    The loss is fused with the output projection where the logits are hidden states times a matrix.
    Elsewhere, as where they are capped or scaled, transformers makes the logits, in chunks. Raises
    ValueError for a model whose tokens attend to later ones, and for one without an output head.
    """

    def __init__(self, model: "PreTrainedModel", config: CausalLMConfig | None = None) -> None:
        super().__init__()
        check_is_model(model)
        self.config = describe_hf(model.config) if config is None else config
        if config is None:  # a recipe checks the configuration that it builds a model of
            check_class(model, self.config)
            check_causal(self.config)
        self.options = TrainingOptions()
        self.model = model
        self.has_plain_head = is_plain_head(model)
        """Whether the logits are hidden states times a matrix, and nothing more."""
        self._head = TransformersHead(model)
        # They never change, so DDP need not send them at every forward.
        constants = [name for name, _ in self.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, constants)

    @property
    def head_weight(self) -> torch.Tensor:
        """The weight (V, D) of the output projection, which maps hidden states to logits."""
        return self.model.get_output_embeddings().weight

    @property
    def body(self) -> nn.Module:
        """The model without its output head."""
        return find_body(self.model)[1]

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks."""
        return find_blocks(self.model)

    def forward(
        self,
        input_ids: torch.Tensor,
        targets: torch.Tensor | None = None,
        document_ends: torch.Tensor | None = None,
        cache: TransformersCache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
        """As `GPT2.forward`; document masking is by positions that restart, as in transformers.

        In training, the gradient of the load-balancing loss of a mixture of experts, times the
        number of targets, is added if its configuration says so (output_router_logits).
        """
        output = self._run_body(input_ids, document_ends, cache)
        hidden = output.last_hidden_state
        if targets is None:
            return self.logits(hidden)
        z_loss = self.options.z_loss if self.training else 0.0
        if self.has_plain_head:
            loss, count = linear_cross_entropy(
                hidden, self.head_weight, targets, z_loss=z_loss, compiled=self.options.compiled
            )
        else:
            size = self.config.vocabulary_size
            loss, count = chunked_loss(
                self._head, hidden, targets, vocabulary_size=size, z_loss=z_loss
            )
        if self._adds_router_loss():
            router_loss = self._head.router_loss(output)
            weighted = self.config.hf.router_aux_loss_coef * router_loss * count
            loss = loss + (weighted - weighted.detach())  # in the gradient alone, as the z-loss
        return loss, count

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        document_ends: torch.Tensor | None = None,
        cache: TransformersCache | None = None,
    ) -> torch.Tensor:
        """Return the hidden states (B, T, D) after the final norm, before the output head."""
        return self._run_body(input_ids, document_ends, cache).last_hidden_state

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, T, V) of hidden states (B, T, D)."""
        if self.has_plain_head:
            return F.linear(hidden, self.head_weight)
        flat = hidden.reshape(1, -1, hidden.shape[-1])
        return self._head.logits(flat).view(*hidden.shape[:-1], -1)

    def initialize(self, seed: int) -> "CausalLMAdapter":
        """Initialize the weights as transformers does, identically on every machine for a seed."""
        from transformers import AutoModelForCausalLM

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            with torch.device("cpu"):
                model = AutoModelForCausalLM.from_config(self.config.hf, dtype=torch.float32)
        self.copy_from(model)
        return self

    @torch.no_grad()
    def copy_from(self, model: "PreTrainedModel") -> None:
        """Copy all parameters and buffers of `model`, which is whole, into this one or its shards.

        Raises ValueError if the two do not have the same parameters, in the same shapes.
        """
        theirs = dict(model.named_parameters())
        for name, parameter in self.model.named_parameters():
            other = theirs.pop(name, None)
            if other is None or other.shape != parameter.shape:
                shape = "missing" if other is None else f"of shape {tuple(other.shape)}"
                raise ValueError(f"{name} must have shape {tuple(parameter.shape)}, it is {shape}")
            fill(parameter, other)
        if theirs:
            raise ValueError(f"the tensors {sorted(theirs)[:3]} have no place in the model")
        for buffer, other in zip(self.model.buffers(), model.buffers(), strict=True):
            buffer.copy_(other)

    def to_empty(self, *, device: torch.device | str, recurse: bool = True) -> "CausalLMAdapter":
        """As `nn.Module.to_empty`; weights that were tied are so afterwards."""
        super().to_empty(device=device, recurse=recurse)
        self.model.tie_weights()
        return self

    def checkpoint_activations(self, kind: ActivationCheckpointing) -> None:
        """Compute activations again in backward, by the hooks that transformers has for it."""
        if kind != "none":
            self.model.gradient_checkpointing_enable(checkpoint_options(kind))

    def _run_body(
        self,
        input_ids: torch.Tensor,
        document_ends: torch.Tensor | None,
        cache: TransformersCache | None,
    ) -> Any:
        """Return the output of the model without its head."""
        options = {}
        if document_ends is not None:
            check_documents(self.config)
            document_ends = expand_document_ends(document_ends, input_ids, cache)
            options["position_ids"] = document_positions(document_ends, input_ids.shape[1])
        if self._adds_router_loss():
            options["output_router_logits"] = True
        if cache is not None:
            return cache.run(self.body, input_ids, **options)
        # No attention mask: given one, transformers ignores document boundaries in the positions.
        return self.body(input_ids=input_ids, use_cache=False, **options)

    def _adds_router_loss(self) -> bool:
        return self.training and getattr(self.config.hf, "output_router_logits", False)


def build_adapter(config: CausalLMConfig) -> CausalLMAdapter:
    """Build the model of a configuration; its weights are not meant to be used."""
    from transformers import AutoModelForCausalLM

    return CausalLMAdapter(AutoModelForCausalLM.from_config(config.hf, dtype=torch.float32), config)
