"""What a network predicts, measured on a few latents: noise (epsilon), v, or the velocity of a rectified flow. Pure functions.

A network is right under one of these assumptions: there it is at least as good as the best linear predictor of the target, pixel by
pixel, and elsewhere worse. High timesteps alone would not do: where hardly any signal is left, a rectified flow and the noise
are nearly the same.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch

from training.method.diffusion import alphas_cumprod, target_of
from training.models.sdxl import Schedule

Network = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""Number of the batch, its noisy latents [B, C, h, w], timesteps [B] -> what the network predicts [B, C, h, w]."""
Kind = Literal["epsilon", "v_prediction", "flow", "unclear"]
_SHARES = (0.25, 0.4, 0.6, 0.8, 0.95)
"""Of the noise schedule: the timesteps that are measured."""
_MOST = 1.1
"""Loss of a network under the right assumption, in losses of the linear predictor; 1 is the best for white noise as data."""
_MOST_OF_EPSILON = 2.2
"""The same at one timestep, up to which epsilon is possible. A distilled network (Lightning, Turbo, DMD) draws one sharp image
where others predict the mean of all that are possible, which doubles its loss."""


def measure_prediction_type(network: Network, latents: Sequence[torch.Tensor], schedule: Schedule) -> Kind:
    """What `network` predicts for `latents` (batches [B, C, h, w], scaled as the UNet expects them), or "unclear". `schedule` is
    the noise of epsilon and v prediction."""
    timesteps = [round(share * schedule.timesteps) for share in _SHARES]
    at_timesteps = [
        _relative_losses(timestep, network, latents, schedule, ("epsilon", "v_prediction"))
        | _relative_losses(timestep, network, latents, schedule, ("flow",))
        for timestep in timesteps
    ]
    losses = {kind: math.prod(each[kind] for each in at_timesteps) ** (1 / len(timesteps)) for kind in at_timesteps[0]}
    if not all(math.isfinite(loss) for loss in losses.values()):
        return "unclear"
    best = min(losses, key=losses.get)
    is_not_epsilon = max(each["epsilon"] for each in at_timesteps) > _MOST_OF_EPSILON
    return best if losses[best] <= _MOST and (best == "epsilon" or is_not_epsilon) else "unclear"


def measure_zero_terminal_snr(network: Network, latents: Sequence[torch.Tensor], schedule: Schedule) -> bool:
    """Whether a network that predicts v was trained with pure noise at the last timestep: it then makes no use of what the usual
    schedule leaves of the signal there."""
    last, kind = schedule.timesteps - 1, "v_prediction"
    usual, zero = (replace(schedule, zero_terminal_snr=switch) for switch in (False, True))
    of_usual, of_zero = (_relative_losses(last, network, latents, each, (kind,))[kind] for each in (usual, zero))
    return of_zero <= of_usual


def _relative_losses(
    timestep: int, network: Network, latents: Sequence[torch.Tensor], schedule: Schedule, kinds: Sequence[Kind]
) -> dict[Kind, float]:
    """The network's mean squared error at `timestep` if it is of one of `kinds`, which share their noisy latents, divided by that
    of the best linear predictor: a factor and an offset for each channel, fitted to the same samples."""
    generator = torch.Generator().manual_seed(timestep)
    alpha_bar = alphas_cumprod(schedule)[timestep : timestep + 1]
    if "flow" in kinds:  # x_t = (1 - t) x_0 + t eps, and dx/dt is predicted (Liu et al. 2022, arXiv 2209.03003)
        signal, noise_share = 1 - timestep / schedule.timesteps, timestep / schedule.timesteps
    else:
        signal, noise_share = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    noisy, predicted, targets = [], [], {kind: [] for kind in kinds}
    for number, batch in enumerate(latents):
        batch = batch.double()
        noise = torch.randn(batch.shape, generator=generator, dtype=torch.float64)
        noisy.append(signal * batch + noise_share * noise)
        predicted.append(network(number, noisy[-1].float(), torch.full((len(batch),), timestep)).double())
        for kind in kinds:
            targets[kind].append(noise - batch if kind == "flow" else target_of(batch, noise, alpha_bar, kind))
    x, prediction = _by_channel(noisy), _by_channel(predicted)
    x = x - x.mean(1, keepdim=True)
    losses = {}
    for kind in kinds:
        target = _by_channel(targets[kind])
        centred = target - target.mean(1, keepdim=True)
        factor = (x * centred).sum(1, keepdim=True) / x.square().sum(1, keepdim=True)
        losses[kind] = ((prediction - target).square().mean() / (centred - factor * x).square().mean()).item()
    return losses


def _by_channel(batches: Sequence[torch.Tensor]) -> torch.Tensor:
    """[C, pixels of all samples] from [B, C, h, w] each."""
    return torch.cat([batch.transpose(0, 1).flatten(1) for batch in batches], 1)
