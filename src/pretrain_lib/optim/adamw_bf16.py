"""AdamW with bf16 moments, which take half the memory of fp32 moments."""

from collections.abc import Callable

import torch
from torch.optim.adamw import adamw

from pretrain_lib.tensors.pieces import local_piece

HIGHEST_BETA = 0.99
MOMENTS = ("exp_avg", "exp_avg_sq")
# Elements updated at a time. On a CPU, small chunks keep the fp32 moments in the cache; on a GPU,
# large chunks are better, because each costs five kernel launches.
CHUNK = {"cpu": 2**18, "cuda": 2**26, "mps": 2**26}


class AdamWBf16(torch.optim.AdamW):
    """torch's fused AdamW, which stores both moments in bf16 and updates them in fp32.

    `betas[1]` must be at most `HIGHEST_BETA`: with a decay rate closer to 1, the changes of the
    second moment would be smaller than the bf16 rounding and get lost.
    """

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a state, and cast its moments back to bf16.

        torch casts them to fp32, also when Accelerate reloads the optimizer's own state.
        """
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state |= {k: v.to(torch.bfloat16) for k, v in state.items() if k != "step"}

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        """Update the parameters; closures are not supported."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: torch.Tensor, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        tensors = (parameter, parameter.grad, *(state[name] for name in MOMENTS))
        held = [local_piece(tensor).tensor for tensor in tensors]
        flat = [tensor.contiguous().view(-1) for tensor in held]
        for chunks in zip(
            *(tensor.split(CHUNK[parameter.device.type]) for tensor in flat), strict=True
        ):
            step = state["step"].clone()
            self._update_chunk(*chunks, step, group)
        state["step"].copy_(step)
        for tensor, updated in zip(held, flat, strict=True):
            if not tensor.is_contiguous():
                tensor.copy_(updated.view(tensor.shape))

    def _update_chunk(
        self,
        weights: torch.Tensor,
        gradient: torch.Tensor,
        first: torch.Tensor,
        second: torch.Tensor,
        step: torch.Tensor,
        group: dict,
    ) -> None:
        stored = weights, gradient, first, second
        exact = [tensor.float() for tensor in stored]
        adamw(
            *([tensor] for tensor in exact),
            [],
            [step],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
        )
        for tensor, updated in zip(stored, exact, strict=True):
            tensor.copy_(updated)  # nothing to do for one in fp32, which is itself
