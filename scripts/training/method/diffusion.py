"""Latents, noise, timesteps, prediction -> loss per sample. Pure functions; all is computed in the dtype of the inputs.

alpha_bar is the cumulative product of 1 - beta (Ho et al. 2020, arXiv 2006.11239, section 2), SNR = alpha_bar / (1 - alpha_bar).
"""

from dataclasses import dataclass
from typing import Literal

import torch

from training.models.sdxl import PredictionType, Schedule

LossKind = Literal["mse", "huber", "l1"]
HUBER_C = 0.1
"""The error at which the pseudo-Huber loss turns from quadratic to linear; the field's usual value."""


@dataclass(frozen=True)
class LossConfig:
    """What is minimised, with every "auto" resolved."""

    prediction_type: PredictionType
    alphas_cumprod: torch.Tensor
    """[timesteps], fp32, on the device of the step."""
    min_snr_gamma: float
    """0: off."""
    noise_offset: float
    """0: off."""
    latent_scaling: float
    """The VAE's scaling factor."""
    loss: LossKind = "mse"


def alphas_cumprod(schedule: Schedule) -> torch.Tensor:
    """The share of the signal's variance that is left at each timestep: [timesteps], float64, on the CPU."""
    root = torch.linspace(schedule.beta_start**0.5, schedule.beta_end**0.5, schedule.timesteps, dtype=torch.float64)
    betas = root**2
    if schedule.zero_terminal_snr:
        betas = _zero_terminal(betas)
    return (1 - betas).cumprod(0)


def _zero_terminal(betas: torch.Tensor) -> torch.Tensor:
    """Betas whose last timestep is pure noise (Lin et al. 2023, arXiv 2305.08891, Algorithm 1)."""
    root = (1 - betas).cumprod(0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    share = root**2
    return 1 - torch.cat([share[:1], share[1:] / share[:-1]])


def sampled_latents(mean: torch.Tensor, log_variance: torch.Tensor, noise: torch.Tensor, scaling_factor: float) -> torch.Tensor:
    """[B, C, h, w]: a draw from the VAE's posterior N(mean, exp(log_variance)), scaled as the UNet expects it."""
    return (mean + torch.exp(0.5 * log_variance) * noise) * scaling_factor


def offset_noise(noise: torch.Tensor, offset: torch.Tensor, strength: float) -> torch.Tensor:
    """[B, C, h, w]: `noise` whose mean per channel is moved by `strength` x `offset` [B, C, 1, 1] (Guttenberg 2023,
    "Diffusion with offset noise"), so that very dark and bright images can be learned."""
    return noise + strength * offset


def noised(latents: torch.Tensor, noise: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """[B, C, h, w]: x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps (Ho et al. 2020, equation 4); `alpha_bar` is [B]."""
    alpha_bar = alpha_bar.view(-1, 1, 1, 1)
    return alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise


def target_of(latents: torch.Tensor, noise: torch.Tensor, alpha_bar: torch.Tensor, prediction_type: PredictionType) -> torch.Tensor:
    """[B, C, h, w]: what the UNet should predict: eps, or v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0
    (Salimans & Ho 2022, arXiv 2202.00512, section 2.4)."""
    if prediction_type == "epsilon":
        return noise
    alpha_bar = alpha_bar.view(-1, 1, 1, 1)
    return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents


def min_snr_weight(alpha_bar: torch.Tensor, gamma: float, prediction_type: PredictionType) -> torch.Tensor:
    """[B]: min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v (Hang et al. 2023, arXiv 2303.09556, section 3.4).

    Written so that SNR = 0, the last timestep of a zero-terminal-SNR schedule, gives the limit and no NaN.
    """
    if prediction_type == "epsilon":
        return torch.clamp(gamma * (1 - alpha_bar) / alpha_bar, max=1.0)
    return torch.minimum(alpha_bar, gamma * (1 - alpha_bar))


def weight_per_sample(alpha_bar: torch.Tensor, config: LossConfig) -> torch.Tensor:
    """[B]: how much each sample counts at its noise level; `alpha_bar` is [B]."""
    if not config.min_snr_gamma:
        return torch.ones_like(alpha_bar)
    return min_snr_weight(alpha_bar, config.min_snr_gamma, config.prediction_type)


def loss_per_sample(
    prediction: torch.Tensor, target: torch.Tensor, kind: LossKind = "mse", mask: torch.Tensor | None = None
) -> torch.Tensor:
    """[B]: the mean over channels and pixels of e^2 (mse), |e| (l1), or the pseudo-Huber loss 2 c (sqrt(e^2 + c^2) - c) (huber),
    which is e^2 for small errors e and 2 c |e| for large ones (Song & Dhariwal 2023, arXiv 2310.14189, section 3.3).

    `mask` [B, 1, h, w] weights the pixels. The mean is over all of them, so that what is inside a mask counts as without one.
    """
    error = prediction - target
    if kind == "l1":
        losses = error.abs()
    elif kind == "huber":
        losses = 2 * HUBER_C * ((error.square() + HUBER_C**2).sqrt() - HUBER_C)
    else:
        losses = error.square()
    return (losses if mask is None else losses * mask).flatten(1).mean(dim=1)
