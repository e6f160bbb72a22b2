"""Latents, noise, timesteps, prediction -> loss per sample. Pure functions; all is computed in the dtype of the inputs.

alpha_bar is the cumulative product of 1 - beta (Ho et al. 2020, arXiv 2006.11239, section 2), SNR = alpha_bar / (1 - alpha_bar).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import torch

from training.config import ObjectiveSettings
from training.models.sdxl import PredictionType, Schedule

LossKind = Literal["mse", "huber", "huber_snr", "l1"]
LossWeighting = Literal["min_snr", "debiased", "none"]
HUBER_C = 0.1
"""The error at which the pseudo-Huber loss turns from quadratic to linear; the field's usual value."""
_HUBER_METADATA = {"ss_loss_type": "huber", "ss_huber_c": str(HUBER_C)}
LOSS_METADATA: dict[LossKind, dict[str, str]] = {
    "mse": {"ss_loss_type": "l2"},
    "huber": _HUBER_METADATA | {"ss_huber_schedule": "constant"},
    "huber_snr": _HUBER_METADATA | {"ss_huber_schedule": "snr"},
    "l1": {"ss_loss_type": "l1"},
}
"""How the metadata of LoRA files names each loss, in the words of kohya's scripts."""
MAX_DEBIASED_SNR = 1000.0
"""The limit of the SNR for debiased estimation, as in kohya's and OneTrainer's: only the first few timesteps have more."""


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
    weighting: LossWeighting = "min_snr"


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


def debiased_weight(alpha_bar: torch.Tensor, prediction_type: PredictionType) -> torch.Tensor:
    """[B]: 1 / sqrt(SNR) for epsilon (Yu et al. 2023, arXiv 2310.08442), 1 / (SNR + 1) for v, with SNR limited to
    MAX_DEBIASED_SNR, as in kohya's `apply_debiased_estimation`."""
    snr = (alpha_bar / (1 - alpha_bar)).clamp(max=MAX_DEBIASED_SNR)
    return snr.rsqrt() if prediction_type == "epsilon" else 1 / (snr + 1)


def weight_per_sample(alpha_bar: torch.Tensor, config: LossConfig) -> torch.Tensor:
    """[B]: how much each sample counts at its noise level; `alpha_bar` is [B]."""
    if config.weighting == "debiased":
        return debiased_weight(alpha_bar, config.prediction_type)
    if config.weighting == "none" or not config.min_snr_gamma:
        return torch.ones_like(alpha_bar)
    return min_snr_weight(alpha_bar, config.min_snr_gamma, config.prediction_type)


def huber_threshold(alpha_bar: torch.Tensor, kind: LossKind) -> torch.Tensor | float:
    """c of the pseudo-Huber loss: HUBER_C, or for "huber_snr" [B, 1, 1, 1]: (1 - c) / (1 + sigma)^2 + c with
    sigma^2 = 1 / SNR, which falls from 1 without noise to HUBER_C (`get_huber_threshold_if_needed` of kohya's sd-scripts,
    `--huber_schedule snr`; Khrapov et al. 2024, arXiv 2403.16728)."""
    if kind != "huber_snr":
        return HUBER_C
    signal = alpha_bar.sqrt()
    share = signal / (signal + (1 - alpha_bar).sqrt())  # 1 / (1 + sigma), which is 0 and not NaN where only noise is left
    return ((1 - HUBER_C) * share.square() + HUBER_C).view(-1, 1, 1, 1)


def loss_per_sample(
    prediction: torch.Tensor,
    target: torch.Tensor,
    kind: LossKind = "mse",
    mask: torch.Tensor | None = None,
    *,
    huber_c: torch.Tensor | float = HUBER_C,
) -> torch.Tensor:
    """[B]: the mean over channels and pixels of e^2 (mse), |e| (l1), or the pseudo-Huber loss 2 c (sqrt(e^2 + c^2) - c) (both
    huber), which is e^2 for small errors e and 2 c |e| for large ones (Song & Dhariwal 2023, arXiv 2310.14189, section 3.3).

    `mask` [B, 1, h, w] weights the pixels. The mean is over all of them, so that what is inside a mask counts as without one.
    """
    error = prediction - target
    if kind == "l1":
        losses = error.abs()
    elif kind in ("huber", "huber_snr"):
        losses = 2 * huber_c * ((error.square() + huber_c**2).sqrt() - huber_c)
    else:
        losses = error.square()
    return (losses if mask is None else losses * mask).flatten(1).mean(dim=1)


def timestep_quantiles(settings: ObjectiveSettings, timesteps: int) -> Callable[[float], int] | None:
    """The timestep at a quantile, 0 .. 1, of the distribution that `settings` choose; None if it is uniform over all `timesteps`.

    Within the limits, the share t of the way is uniform or the logistic function of a standard normal number (Esser et al. 2024,
    arXiv 2403.03206, section 3.1), then shifted to s t / (1 + (s - 1) t) (section 5.3.2): for the latter, a mean of ln s.
    """
    first, end, shift = settings.timestep_min, settings.timestep_max or timesteps, settings.timestep_shift
    is_uniform = settings.timestep_sampling == "uniform"
    if is_uniform and (first, end, shift) == (0, timesteps, 1.0):
        return None

    def timestep_at(quantile: float) -> int:
        share = quantile
        if not is_uniform:
            share = 1 / (1 + math.exp(-NormalDist().inv_cdf(min(max(quantile, 1e-12), 1 - 1e-12))))
        share = shift * share / (1 + (shift - 1) * share)
        return min(first + int(share * (end - first)), end - 1)

    return timestep_at
