"""Latents, noise, timesteps, prediction -> loss per sample. Pure functions; all is computed in the dtype of the inputs.

alpha_bar is the cumulative product of 1 - beta (Ho et al. 2020, arXiv 2006.11239, section 2), SNR = alpha_bar / (1 - alpha_bar).
"""

import torch

from training.models.sdxl import PredictionType, Schedule


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
    """[B, C, h, w]: a draw from the VAE's posterior N(mean, exp(log_variance)), scaled as the UNet wants it."""
    return (mean + torch.exp(0.5 * log_variance) * noise) * scaling_factor


def offset_noise(noise: torch.Tensor, offset: torch.Tensor, strength: float) -> torch.Tensor:
    """[B, C, h, w]: `noise` whose mean per channel is moved by `strength` x `offset` [B, C, 1, 1] (Guttenberg 2023,
    "Diffusion with offset noise"), so that very dark and bright images can be learned."""
    return noise + strength * offset


def noised(latents: torch.Tensor, noise: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """[B, C, h, w]: x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps (Ho et al. 2020, equation 4); `alpha_bar` is [B]."""
    alpha_bar = alpha_bar.view(-1, 1, 1, 1)
    return alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise


def target(latents: torch.Tensor, noise: torch.Tensor, alpha_bar: torch.Tensor, prediction_type: PredictionType) -> torch.Tensor:
    """[B, C, h, w]: what the UNet should have answered: eps, or v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0
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


def loss_per_sample(prediction: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """[B]: mean squared error over channels and pixels."""
    return (prediction - wanted).square().flatten(1).mean(dim=1)
