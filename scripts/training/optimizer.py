"""The optimizer, and the learning rate as a pure function of the step."""

import math
from typing import Literal

import torch

from training.config import OptimizerSettings


def build_optimizer(weights: torch.nn.Parameter, settings: OptimizerSettings) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) over the flat fp32 `weights`; on CUDA it can be captured.

    Its moments are there from the start, zero, so that a saved state always has the same tensors.
    """
    optimizer = torch.optim.AdamW(
        [weights],
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        fused=True,
        capturable=weights.device.type == "cuda",
    )
    optimizer.state[weights] = {
        "step": torch.zeros((), dtype=torch.float32, device=weights.device),
        "exp_avg": torch.zeros_like(weights),
        "exp_avg_sq": torch.zeros_like(weights),
    }
    return optimizer


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
