"""Prodigy as a formula on flat buffers, which can be part of a CUDA graph: it never waits for the GPU."""

import math

import torch
from torch.optim.adamw import adamw

from training.config import OptimizerSettings

FIRST_ESTIMATE = 1e-6
"""d before the first step, as in prodigyopt."""
_MANY_STEPS = 1e9
"""After so many steps, AdamW's own bias correction divides by exactly 1."""

_MOST_OF_A_DOT = 2**30
"""Elements of one dot product: torch allows fewer than 2^31, and a LoRA of rank 1024 has more weights."""


class Prodigy:
    """AdamW that finds its own learning rate d, of which LEARNING_RATE is a factor (Mishchenko & Defazio 2023, arXiv 2306.06101,
    Algorithm 4), with what its authors advise for diffusion models: bias correction, and `safeguard_warmup`, which keeps the
    factor out of the denominator of d. Equal to prodigyopt.Prodigy with these options.

    prodigyopt keeps the moments of d times the gradient. Here they are divided by d, and by its square, so that torch's fused
    AdamW computes them and the update in one pass.
    """

    floats_per_weight = 4.0
    label = "prodigyopt.Prodigy"
    capturable = True

    def __init__(self, weights: torch.nn.Parameter, settings: OptimizerSettings):
        self.param_groups = [{"params": [weights]}]
        self._weights, self._settings = weights, settings
        zeros = {name: torch.zeros_like(weights, requires_grad=False) for name in ("exp_avg", "exp_avg_sq", "s")}
        numbers = {"d": FIRST_ESTIMATE, "d_numerator": 0.0, "k": 0.0}
        of_numbers = {name: torch.tensor(value, dtype=torch.float64, device=weights.device) for name, value in numbers.items()}
        self._state = zeros | {"p0": weights.detach().clone()} | of_numbers
        """By the names of prodigyopt; k counts the steps."""
        self._many_steps = torch.tensor(_MANY_STEPS, device=weights.device)

    @torch.no_grad()
    def step(self, learning_rate: torch.Tensor, found_inf: torch.Tensor | None = None) -> None:
        state, beta1, beta2 = self._state, self._settings.adam_beta1, self._settings.adam_beta2
        gradient, s, d = self._weights.grad, state["s"], state["d"]
        is_finite = torch.ones_like(d, dtype=torch.bool) if found_inf is None else found_inf == 0
        gradient.masked_fill_(~is_finite, 0.0)

        k = state["k"] + 1
        rate = d * learning_rate.double() * (1 - beta2**k).sqrt() / (1 - beta1**k)
        pairs = zip(gradient.split(_MOST_OF_A_DOT), (state["p0"] - self._weights).split(_MOST_OF_A_DOT), strict=True)
        progress = sum(torch.dot(*pair).double() for pair in pairs)
        numerator = math.sqrt(beta2) * state["d_numerator"] + d / FIRST_ESTIMATE * rate * progress
        s.mul_(torch.where(is_finite, math.sqrt(beta2), 1.0)).addcmul_(gradient, (d * d / FIRST_ESTIMATE).float())
        denominator = torch.linalg.vector_norm(s, ord=1).double()
        moves = is_finite & (denominator > 0)  # prodigyopt takes no step either as long as every gradient was 0
        larger = torch.where(moves, torch.maximum(d, numerator / denominator), d)

        shrinks = d / larger
        state["exp_avg"].mul_(shrinks.float())
        state["exp_avg_sq"].mul_(shrinks.square().float())
        adamw(
            [self._weights],
            [gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [self._many_steps],
            fused=True,
            capturable=self._weights.is_cuda,
            grad_scale=(larger / d).float(),
            found_inf=(~moves).float(),
            amsgrad=False,
            maximize=False,
            lr=rate.float(),
            beta1=beta1,
            beta2=beta2,
            eps=self._settings.adam_epsilon,
            weight_decay=self._settings.weight_decay,
        )
        for name, value in (("d", larger), ("d_numerator", numerator), ("k", k)):
            state[name].copy_(torch.where(moves, value, state[name]))

    def averaged_weights(self) -> None:
        return None

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self._state)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for name, tensor in self._state.items():  # in place: a CUDA graph may hold their addresses
            tensor.copy_(state[name])
