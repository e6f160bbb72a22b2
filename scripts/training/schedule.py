"""The noise schedule that a base model was trained with. Pure."""

from dataclasses import dataclass, replace
from typing import Literal

import torch

PredictionType = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True)
class Schedule:
    """What the model predicts, and the betas; the defaults are SDXL's."""

    prediction_type: PredictionType = "epsilon"
    zero_terminal_snr: bool = False
    beta_start: float = 0.00085
    beta_end: float = 0.012
    timesteps: int = 1000

    def with_settings(self, prediction_type: str, zero_terminal_snr: bool | str) -> "Schedule":
        """The schedule with what the settings say in place of what the base says; "auto" keeps the base's."""
        kept = self
        if prediction_type != "auto":
            kept = replace(kept, prediction_type=prediction_type)
        if zero_terminal_snr != "auto":
            kept = replace(kept, zero_terminal_snr=zero_terminal_snr)
        return kept


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
