"""The optimizer, and the learning rate as a pure function of the step."""

import math
from typing import Literal

import torch
from torch.optim.adamw import adamw

from training.config import OptimizerSettings


class AdamW:
    """Fused AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) over the flat fp32 `weights`; on CUDA it can be captured.

    torch's own function. Its class would import torch's compiler at the first step, which takes seconds.
    """

    def __init__(self, weights: torch.nn.Parameter, settings: OptimizerSettings):
        self.param_groups = [{"params": [weights]}]
        """What torch.amp.GradScaler wants to see."""
        self.state = {
            "step": torch.zeros((), dtype=torch.float32, device=weights.device),
            "exp_avg": torch.zeros_like(weights, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(weights, requires_grad=False),
        }
        """The number of steps taken and the two moments, as torch.optim.AdamW calls them."""
        self._weights = weights
        self._settings = settings

    @torch.no_grad()
    def step(self, learning_rate: torch.Tensor, halted: torch.Tensor | None = None) -> None:
        """Take one step with the gradients that `weights` have; where `halted` (scalar) is not 0, nothing changes."""
        adamw(
            [self._weights],
            [self._weights.grad],
            [self.state["exp_avg"]],
            [self.state["exp_avg_sq"]],
            [],
            [self.state["step"]],
            fused=True,
            capturable=self._weights.is_cuda,
            found_inf=halted,
            amsgrad=False,
            maximize=False,
            lr=learning_rate,
            beta1=self._settings.adam_beta1,
            beta2=self._settings.adam_beta2,
            eps=self._settings.adam_epsilon,
            weight_decay=self._settings.weight_decay,
        )


def steps_of_warmup(share: float, total_steps: int) -> int:
    """Optimizer steps over which the rate rises: the `share` of all, rounded up."""
    return math.ceil(share * total_steps)


def learning_rate_at(
    step: int, total_steps: int, peak: float, scheduler: Literal["constant", "linear", "cosine"], warmup_steps: int
) -> float:
    """The rate of optimizer step `step` (0 .. total_steps - 1): a linear rise over the first `warmup_steps` to `peak`,
    then constant, or falling to 0 after the last step on a line or half a cosine."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[scheduler]
    return peak * factor
