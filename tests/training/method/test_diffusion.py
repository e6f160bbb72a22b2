"""The objective against formulas written out one number at a time, in Python's own floats."""

import math

import pytest
import torch

from training.config import ObjectiveSettings
from training.method import diffusion as objective

SHARES = [0.9991, 0.75, 0.2, 0.0047, 0.0]
"""alpha_bar from the first timestep to the last one of a zero-terminal-SNR schedule, with SNRs of 1110, 3, 0.25, 0.0047 and 0."""


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    names = ("latents", "noise", "prediction")
    made = {name: torch.randn(len(SHARES), 2, 3, 2, dtype=torch.float64, generator=generator) for name in names}
    return made | {"alpha_bar": torch.tensor(SHARES, dtype=torch.float64)}


def numbers(tensor: torch.Tensor) -> list[list[float]]:
    return tensor.flatten(1).tolist()


def written_out(latents, noise, prediction, prediction_type: str, gamma: float) -> list[float]:
    """The loss of each sample from SNR = alpha_bar / (1 - alpha_bar) and the papers' formulas, limits at SNR 0 by hand."""
    losses = []
    for share, x, e, answer in zip(SHARES, latents, noise, prediction, strict=True):
        signal, rest = math.sqrt(share), math.sqrt(1 - share)
        wanted = e if prediction_type == "epsilon" else [signal * ei - rest * xi for xi, ei in zip(x, e, strict=True)]
        loss = sum((a - w) ** 2 for a, w in zip(answer, wanted, strict=True)) / len(wanted)
        snr = share / (1 - share)
        if gamma and prediction_type == "epsilon":
            loss *= min(snr, gamma) / snr if snr else 1.0
        elif gamma:
            loss *= min(snr, gamma) / (snr + 1)
        losses.append(loss)
    return losses


def ours(tensors, prediction_type: str, gamma: float) -> torch.Tensor:
    wanted = objective.target_of(tensors["latents"], tensors["noise"], tensors["alpha_bar"], prediction_type)
    losses = objective.loss_per_sample(tensors["prediction"], wanted)
    return losses * objective.min_snr_weight(tensors["alpha_bar"], gamma, prediction_type) if gamma else losses


@pytest.mark.parametrize("gamma", [0, 1, 5])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_loss_of_each_sample(tensors, prediction_type, gamma):
    expected = written_out(*(numbers(tensors[name]) for name in ("latents", "noise", "prediction")), prediction_type, gamma)
    losses = ours(tensors, prediction_type, gamma)
    assert losses.dtype == torch.float64
    assert losses.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("gamma", [0, 5])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_gradient_of_the_prediction(tensors, prediction_type, gamma):
    """d loss / d prediction = weight x 2 (prediction - target) / number of values."""
    prediction = tensors["prediction"].requires_grad_()
    ours(tensors, prediction_type, gamma).sum().backward()
    for share, x, e, answer, gradient in zip(
        SHARES,
        *(numbers(tensors[name].detach()) for name in ("latents", "noise", "prediction")),
        numbers(prediction.grad),
        strict=True,
    ):
        signal, rest, snr = math.sqrt(share), math.sqrt(1 - share), share / (1 - share)
        is_v = prediction_type == "v_prediction"
        wanted = [signal * ei - rest * xi for xi, ei in zip(x, e, strict=True)] if is_v else e
        weight = min(snr, gamma) / (snr + 1 if is_v else snr or 1) if gamma and (snr or is_v) else 1.0
        expected = [weight * 2 * (a - w) / len(wanted) for a, w in zip(answer, wanted, strict=True)]
        assert gradient == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_latents_are_drawn_from_the_posterior_and_scaled(tensors):
    """z = (mean + sigma n) x scaling factor, sigma^2 = exp(log-variance)."""
    mean, log_variance, noise = tensors["latents"], tensors["prediction"], tensors["noise"]
    drawn = objective.sampled_latents(mean, log_variance, noise, 0.13025)
    for m, lv, n, got in zip(*(part.flatten().tolist() for part in (mean, log_variance, noise, drawn)), strict=True):
        assert got == pytest.approx((m + math.sqrt(math.exp(lv)) * n) * 0.13025, rel=1e-12)


def test_noising_keeps_the_variance_and_ends_in_pure_noise(tensors):
    noisy = objective.noised(tensors["latents"], tensors["noise"], tensors["alpha_bar"])
    for share, x, e, got in zip(SHARES, *(numbers(part) for part in (tensors["latents"], tensors["noise"], noisy)), strict=True):
        expected = [math.sqrt(share) * xi + math.sqrt(1 - share) * ei for xi, ei in zip(x, e, strict=True)]
        assert got == pytest.approx(expected, rel=1e-12)
    assert torch.equal(noisy[-1], tensors["noise"][-1])


def test_v_at_the_last_timestep_of_a_zero_terminal_schedule_is_minus_the_latents(tensors):
    wanted = objective.target_of(tensors["latents"], tensors["noise"], tensors["alpha_bar"], "v_prediction")
    assert torch.equal(wanted[-1], -tensors["latents"][-1])


def test_offset_moves_each_channel_by_its_own_number(tensors):
    offset = torch.tensor([[1.0, -2.0]] * len(SHARES), dtype=torch.float64)[..., None, None]
    moved = objective.offset_noise(tensors["noise"], offset, 0.0357) - tensors["noise"]
    assert moved[:, 0].flatten().tolist() == pytest.approx([0.0357] * 6 * len(SHARES), rel=1e-9)
    assert moved[:, 1].flatten().tolist() == pytest.approx([-0.0714] * 6 * len(SHARES), rel=1e-9)


@pytest.mark.parametrize("kind", ["l1", "huber"])
def test_other_losses_of_each_sample(tensors, kind):
    """Written out: |e|, and the pseudo-Huber loss 2 c (sqrt(e^2 + c^2) - c) with c = 0.1."""
    prediction, target = tensors["prediction"], tensors["noise"]
    found = objective.loss_per_sample(prediction, target, kind).tolist()
    for answer, wanted, loss in zip(numbers(prediction), numbers(target), found, strict=True):
        errors = [a - w for a, w in zip(answer, wanted, strict=True)]
        each = [abs(e) if kind == "l1" else 2 * 0.1 * (math.sqrt(e * e + 0.01) - 0.1) for e in errors]
        assert loss == pytest.approx(sum(each) / len(each), rel=1e-12)


def test_huber_is_the_square_of_small_errors_and_grows_linearly_with_large_ones():
    def loss(error: float) -> float:
        one = torch.full((1, 1, 1, 1), error, dtype=torch.float64)
        return objective.loss_per_sample(one, torch.zeros_like(one), "huber").item()

    assert loss(1e-3) == pytest.approx(1e-6, rel=1e-4)
    assert loss(20.0) - loss(10.0) == pytest.approx(2.0, rel=1e-3)  # 2 c for each unit


def test_threshold_of_scheduled_huber_is_kohyas(tensors):
    """(1 - c) / (1 + sigma)^2 + c with sigma = sqrt((1 - alpha_bar) / alpha_bar) and c = 0.1, and its limit in pure noise."""
    thresholds = [0.1 if not share else 0.9 / (1 + math.sqrt((1 - share) / share)) ** 2 + 0.1 for share in SHARES]
    assert thresholds[0] > 0.9
    assert thresholds[-2] < 0.11
    c = objective.huber_threshold(tensors["alpha_bar"], "huber_snr")
    assert c.flatten().tolist() == pytest.approx(thresholds, rel=1e-12)
    assert objective.huber_threshold(tensors["alpha_bar"], "huber") == 0.1
    found = objective.loss_per_sample(tensors["prediction"], tensors["noise"], "huber_snr", huber_c=c).tolist()
    for answer, wanted, limit, loss in zip(
        numbers(tensors["prediction"]), numbers(tensors["noise"]), thresholds, found, strict=True
    ):
        each = [2 * limit * (math.sqrt((a - w) ** 2 + limit**2) - limit) for a, w in zip(answer, wanted, strict=True)]
        assert loss == pytest.approx(sum(each) / len(each), rel=1e-12)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_debiased_weights_are_kohyas(prediction_type):
    """1 / sqrt(SNR) or 1 / (SNR + 1), with an SNR of at most 1000."""
    shares = SHARES[:-1] if prediction_type == "epsilon" else SHARES  # the weight of epsilon has no limit in pure noise
    snrs = [min(share / (1 - share), 1000) for share in shares]
    assert snrs[0] == 1000
    expected = [1 / math.sqrt(snr) if prediction_type == "epsilon" else 1 / (snr + 1) for snr in snrs]
    alpha_bar = torch.tensor(shares, dtype=torch.float64)
    config = objective.LossConfig(prediction_type, alpha_bar, 5.0, 0.0, 1.0, weighting="debiased")
    assert objective.weight_per_sample(alpha_bar, config).tolist() == pytest.approx(expected, rel=1e-12)
    unweighted = objective.LossConfig(prediction_type, alpha_bar, 5.0, 0.0, 1.0, weighting="none")
    assert objective.weight_per_sample(alpha_bar, unweighted).tolist() == [1.0] * len(shares)


QUANTILES = [(number + 0.5) / 20000 for number in range(20000)]


def drawn(**settings) -> torch.Tensor:
    timestep_at = objective.timestep_quantiles(ObjectiveSettings(**settings), 1000)
    return torch.tensor([timestep_at(quantile) for quantile in QUANTILES], dtype=torch.float64)


def test_uniform_timesteps_have_no_function_and_keep_their_draws():
    assert objective.timestep_quantiles(ObjectiveSettings(), 1000) is None
    assert objective.timestep_quantiles(ObjectiveSettings(timestep_max=1000), 1000) is None


def test_timesteps_within_limits_are_equally_likely():
    counts = drawn(timestep_min=200, timestep_max=600).long().bincount(minlength=1000)
    assert counts[:200].sum() == counts[600:].sum() == 0
    assert counts[200:600].tolist() == [50] * 400
    assert set(drawn(timestep_min=999).tolist()) == {999}


@pytest.mark.parametrize(
    ("sampling", "shift"), [("uniform", 0.5), ("uniform", 3.0), ("logit_normal", 0.5), ("logit_normal", 1.0), ("logit_normal", 3.0)]
)
def test_sampling_of_timesteps_has_the_density_of_its_paper(sampling, shift):
    """The share of timesteps below t, from the distribution function: t' = s t / (1 + (s - 1) t), inverted; of the logit of a
    logit-normal number, that of the normal distribution."""
    found = drawn(timestep_sampling=sampling, timestep_shift=shift)
    for below in (50, 200, 500, 800, 950):
        share = below / 1000
        share = share / (shift - (shift - 1) * share)
        expected = share if sampling == "uniform" else 0.5 * math.erfc(-math.log(share / (1 - share)) / math.sqrt(2))
        assert (found < below).double().mean().item() == pytest.approx(expected, abs=1e-4)
    assert 0 <= found.min() <= found.max() <= 999


@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_weights_of_samples_multiply_their_losses(tensors, gamma):
    config = objective.LossConfig("epsilon", tensors["alpha_bar"], gamma, 0.0, 1.0)
    expected = objective.min_snr_weight(tensors["alpha_bar"], 5.0, "epsilon") if gamma else torch.ones(len(SHARES))
    assert objective.weight_per_sample(tensors["alpha_bar"], config).tolist() == pytest.approx(expected.tolist())


@pytest.mark.parametrize("kind", ["mse", "l1", "huber"])
def test_a_mask_scales_the_gradient_outside_it_and_nothing_else(tensors, kind):
    """Exactly, in float64: inside, the gradient of the prediction is what it is without a mask."""
    mask = torch.ones(len(SHARES), 1, 3, 2, dtype=torch.float64)
    mask[:, :, 1:] = 0.1
    gradients = []
    for weights in (None, mask):
        prediction = tensors["prediction"].clone().requires_grad_(True)
        objective.loss_per_sample(prediction, tensors["noise"], kind, weights).sum().backward()
        gradients.append(prediction.grad)
    plain, masked = gradients
    assert torch.equal(masked[:, :, :1], plain[:, :, :1])
    assert torch.allclose(masked[:, :, 1:], 0.1 * plain[:, :, 1:], rtol=1e-14, atol=0)
