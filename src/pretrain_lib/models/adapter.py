"""Train any causal language model of transformers with this library."""

import torch
import torch.nn.functional as F
from torch import nn

from pretrain_lib.models.attention import document_positions
from pretrain_lib.models.loss import linear_cross_entropy


class CausalLMAdapter(nn.Module):
    """Wraps a causal language model of transformers, with the `forward` and fused loss of `GPT2`.

    Raises ValueError for models that the fused loss would not train correctly.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or head.bias is not None:
            raise ValueError(
                f"{type(model).__name__}: the fused loss needs a linear head without bias, "
                f"this one has {head}"
            )
        self._check_head()
        self._keeps_documents_apart = False  # checked at the first use

    @property
    def head_weight(self) -> torch.Tensor:
        """The weight (V, D) of the output projection, which maps hidden states to logits."""
        return self.model.get_output_embeddings().weight

    def forward(
        self,
        input_ids: torch.Tensor,
        targets: torch.Tensor | None = None,
        document_ends: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
        """As `GPT2.forward`; document masking is by positions that restart, as in transformers."""
        options = {}
        if document_ends is not None:
            self._check_documents()
            options["position_ids"] = document_positions(document_ends, input_ids.shape[1])
        # No attention mask: given one, transformers ignores document boundaries in the positions.
        output = self.model.base_model(input_ids=input_ids, use_cache=False, **options)
        hidden = output.last_hidden_state
        if targets is None:
            return F.linear(hidden, self.head_weight)
        return linear_cross_entropy(hidden, self.head_weight, targets)

    @torch.no_grad()
    def _check_head(self) -> None:
        """Raise ValueError if the logits are more than a linear projection of the hidden states."""
        heads_output = []

        def scale_up(_: nn.Module, __: tuple, output: torch.Tensor) -> torch.Tensor:
            # Capping affects large logits only, which an untrained model does not produce.
            heads_output.append(output * (1e3 / output.abs().max()))
            return heads_output[-1]

        ids = torch.arange(4, device=self.head_weight.device)[None]
        hook = self.model.get_output_embeddings().register_forward_hook(scale_up)
        training = self.model.training
        logits = self.model.eval()(input_ids=ids, use_cache=False).logits
        self.model.train(training)
        hook.remove()
        if not torch.allclose(logits, heads_output[-1], rtol=1e-4):
            raise ValueError(
                f"{type(self.model).__name__} scales or caps its logits: the fused loss would "
                f"train another model"
            )

    @torch.no_grad()
    def _check_documents(self) -> None:
        """Raise ValueError if the model attends across documents although positions restart."""
        if self._keeps_documents_apart:
            return
        ids = torch.arange(8, device=self.head_weight.device)[None]
        others = ids.clone()
        others[:, :4] += 8
        positions = torch.arange(4, device=ids.device).repeat(2)[None]
        training = self.model.training
        one, two = (
            self.model.base_model.eval()(
                input_ids=x, position_ids=positions, use_cache=False
            ).last_hidden_state[:, 4:]
            for x in (ids, others)
        )
        self.model.train(training)
        if float((one - two).abs().max()) > 1e-6 * float(one.abs().max()):
            raise ValueError(
                f"{type(self.model).__name__} attends beyond a document whose positions restart: "
                f"train it without document_ends (data.document_masking=false)"
            )
        self._keeps_documents_apart = True
