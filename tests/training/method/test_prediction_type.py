"""A network that answers analytically for Gaussian data is recognised in each parametrisation."""

import math

import pytest
import torch

from training.method.diffusion import alphas_cumprod
from training.method.prediction_type import measure_prediction_type, measure_zero_terminal_snr
from training.models.sdxl import Schedule

USUAL, ZERO = Schedule(), Schedule("v_prediction", zero_terminal_snr=True)
SIDE = 24
DATA = {
    "white": (0.0, 1.0, 0.0),
    "white, small": (0.0, 0.4, 0.0),
    "white, large": (0.0, 2.0, 0.0),
    "white, bright": (0.0, 1.0, 0.5),
    "smooth": (2.0, 1.0, 0.0),
    "smooth, small": (2.0, 0.05, 0.1),
    "smooth, large": (3.0, 1.3, -0.5),
}
"""How fast the power of the data falls with the frequency; their variance and their mean."""


def power(slope: float, variance: float) -> torch.Tensor:
    """[h, w]: the variance of each frequency of the data."""
    frequency = torch.fft.fftfreq(SIDE, dtype=torch.float64)
    spectrum = (frequency[:, None] ** 2 + frequency[None] ** 2 + 1e-3) ** (-slope / 2)
    return spectrum / spectrum.mean() * variance


def shares(kind: str, schedule: Schedule, timestep: int) -> tuple[float, float]:
    """Of signal and noise in the noisy latents."""
    if kind == "flow":
        return 1 - timestep / schedule.timesteps, timestep / schedule.timesteps
    alpha_bar = alphas_cumprod(schedule)[timestep].item()
    return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)


def network_of(kind: str, schedule: Schedule, data: tuple[float, float, float]):
    """The expectation of the target given the noisy latents, which is what the best network predicts for this data."""
    variances, mean = power(*data[:2]), data[2]

    def network(number, noisy, timesteps):
        assert len(timesteps) == len(noisy)
        signal, noise_share = shares(kind, schedule, timesteps[0].item())
        centred = torch.fft.fft2(noisy.double() - signal * mean)
        wiener = signal * variances / (signal**2 * variances + noise_share**2)
        sample = mean + torch.fft.ifft2(wiener * centred).real
        noise = (noisy.double() - signal * sample) / noise_share
        predicted = {"epsilon": noise, "v_prediction": signal * noise - noise_share * sample, "flow": noise - sample}
        return predicted[kind].float()

    return network


def latents_of(data: tuple[float, float, float], count: int = 4) -> list[torch.Tensor]:
    """Two batches."""
    generator = torch.Generator().manual_seed(3)
    white = torch.randn(count, 4, SIDE, SIDE, generator=generator, dtype=torch.float64)
    latents = data[2] + torch.fft.ifft2(torch.fft.fft2(white) * power(*data[:2]).sqrt()).real
    return list(latents.float().split([1, count - 1]))


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
@pytest.mark.parametrize(
    ("kind", "schedule"), [("epsilon", USUAL), ("v_prediction", USUAL), ("v_prediction", ZERO), ("flow", USUAL)]
)
def test_the_parametrisation_of_an_exact_network_is_measured(data, kind, schedule):
    assert measure_prediction_type(network_of(kind, schedule, data), latents_of(data), USUAL) == kind


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_a_distilled_network_is_not_taken_for_another_one(data):
    """It predicts the noise for one of the possible images, not for their mean."""
    variances, mean = power(*data[:2]), data[2]
    generator = torch.Generator().manual_seed(4)

    def network(number, noisy, timesteps):
        signal, noise_share = shares("epsilon", USUAL, timesteps[0].item())
        total = signal**2 * variances + noise_share**2
        white = torch.randn(noisy.shape, generator=generator, dtype=torch.float64)
        spectrum = signal * variances / total * torch.fft.fft2(noisy.double() - signal * mean)
        spectrum += (variances * noise_share**2 / total).sqrt() * torch.fft.fft2(white)
        return ((noisy.double() - signal * (mean + torch.fft.ifft2(spectrum).real)) / noise_share).float()

    assert measure_prediction_type(network, latents_of(data), USUAL) in ("epsilon", "unclear")


@pytest.mark.parametrize("data", [data for data in DATA.values() if data[0]], ids=[name for name in DATA if "smooth" in name])
@pytest.mark.parametrize("schedule", [USUAL, ZERO], ids=["usual", "zero"])
def test_zero_terminal_snr_is_measured_where_images_are_smooth(data, schedule):
    network = network_of("v_prediction", schedule, data)
    assert measure_zero_terminal_snr(network, latents_of(data), USUAL) == schedule.zero_terminal_snr


@pytest.mark.parametrize("size", [0.5, 1.0, math.nan, math.inf])
def test_a_network_that_predicts_nothing_is_none_of_them(size):
    generator = torch.Generator().manual_seed(0)

    def network(number, noisy, timesteps):
        return size * torch.randn(noisy.shape, generator=generator) + 0.5 * size * noisy

    assert measure_prediction_type(network, latents_of(DATA["smooth"]), USUAL) == "unclear"
