"""The noise schedule against formulas written out one number at a time."""

import math

import pytest
import torch

from training.method.diffusion import alphas_cumprod
from training.models.sdxl import Schedule


def _betas() -> list[float]:
    first, last = math.sqrt(0.00085), math.sqrt(0.012)
    return [(first + (last - first) * t / 999) ** 2 for t in range(1000)]


def _products(betas: list[float]) -> list[float]:
    share, shares = 1.0, []
    for beta in betas:
        share *= 1 - beta
        shares.append(share)
    return shares


def test_sdxl_schedule_is_the_product_of_scaled_linear_betas():
    computed = alphas_cumprod(Schedule())
    assert computed.dtype == torch.float64
    torch.testing.assert_close(computed, torch.tensor(_products(_betas()), dtype=torch.float64), rtol=1e-12, atol=0)


def test_sdxl_schedule_has_the_known_ends():
    sigmas = ((1 - alphas_cumprod(Schedule())) / alphas_cumprod(Schedule())).sqrt()
    assert sigmas[0].item() == pytest.approx(0.0292, abs=1e-4)
    assert sigmas[-1].item() == pytest.approx(14.6146, abs=1e-3)


def test_zero_terminal_snr_follows_algorithm_1_of_the_paper():
    roots = [math.sqrt(share) for share in _products(_betas())]
    scaled = [(root - roots[-1]) * roots[0] / (roots[0] - roots[-1]) for root in roots]
    computed = alphas_cumprod(Schedule(zero_terminal_snr=True))
    assert computed[-1] == 0
    assert computed[0].item() == pytest.approx(roots[0] ** 2, rel=1e-12)
    torch.testing.assert_close(computed, torch.tensor([root**2 for root in scaled], dtype=torch.float64), rtol=1e-9, atol=1e-15)
    assert (computed.diff() < 0).all()


def test_zero_terminal_snr_agrees_with_diffusers():
    from diffusers import DDPMScheduler

    for zero in (False, True):
        theirs = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=zero)
        ours = alphas_cumprod(Schedule(zero_terminal_snr=zero))
        torch.testing.assert_close(ours.float(), theirs.alphas_cumprod, rtol=1e-4, atol=1e-7)


def test_settings_override_the_base_model():
    declared = Schedule("v_prediction", zero_terminal_snr=True)
    assert declared.with_settings("auto", "auto") == declared
    assert declared.with_settings("epsilon", "auto") == Schedule("epsilon", zero_terminal_snr=True)
    assert declared.with_settings("auto", False) == Schedule("v_prediction")
