"""The training step on a UNet of one block a side: loss and gradient against plain mathematics in float64, and its promises.

A step is observed from outside: by what it reports, and by what a plain gradient descent with rate 1 does to the weights.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch

from training.config import LoraSettings, OptimizerSettings
from training.data.batches import Batch
from training.engine import prepare_unet
from training.engine.step import TrainStep
from training.method.adapters import ADAPTER, Adapter, inject
from training.method.diffusion import LossConfig, alphas_cumprod
from training.method.optimizers import AdamW
from training.models.sdxl import Schedule
from training.models.weights import UNet2DConditionModel
from training.system.device import Precision

SCALING = 0.13025
PLAIN, V, V_ZERO = Schedule(), Schedule("v_prediction"), Schedule("v_prediction", zero_terminal_snr=True)


@pytest.fixture(scope="module")
def plain_unet() -> UNet2DConditionModel:
    """Conditioned as SDXL's is, on hidden states, pooled text and six numbers; shallow, so that fp32 stays near float64."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=96,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64 + 6 * 8,
    )
    return unet.requires_grad_(False).eval()


@pytest.fixture
def lora_unet(plain_unet):
    """`lora_unet()`: the UNet with a LoRA in it, and the LoRA. `up` is random, so that every weight has a gradient."""

    def make():
        unet = copy.deepcopy(plain_unet)
        lora = inject(unet, LoraSettings(lora_rank=4, lora_alpha=2.0), seed=7)
        generator = torch.Generator().manual_seed(1)
        for module in lora.modules:
            module.up.copy_(0.1 * torch.randn(module.up.shape, generator=generator))
        return unet, lora

    return make


def batch_of(timesteps: list[int], seed: int = 0) -> Batch:
    """Samples of 8 x 8 latents; sample i has the same numbers whatever comes after it."""
    samples = []
    for position, timestep in enumerate(timesteps):
        generator = torch.Generator().manual_seed(1000 * seed + position)
        normal = {name: torch.randn(4, 8, 8, generator=generator) for name in ("mean", "latent_noise", "noise")}
        log_variance = 0.3 * torch.randn(4, 8, 8, generator=generator) - 2
        offset, hidden, pooled = (torch.randn(shape, generator=generator) for shape in ((4, 1, 1), (77, 96), (64,)))
        normal["mean"] *= 5
        time_ids = torch.tensor([512.0, 400.0, 3.0 * position, 7.0, 64.0, 64.0])
        made = normal | {"log_variance": log_variance, "offset": offset, "hidden": hidden, "pooled": pooled}
        samples.append(made | {"timesteps": torch.tensor(timestep), "add_time_ids": time_ids})
    stacked = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    return Batch(**stacked, weights=torch.full((len(timesteps),), 1 / len(timesteps)))


def part_of(batch: Batch, first: int, last: int) -> Batch:
    return replace(batch, **{part.name: getattr(batch, part.name)[first:last] for part in fields(batch)})


@pytest.fixture(params=["plain", "fast"])
def stepper(request) -> Callable[..., TrainStep]:
    """A function that makes the training step of an adapter in a UNet, by either engine."""

    def make(unet, lora, optimizer, schedule=PLAIN, gamma=5.0, offset=0.0357, max_grad_norm=0.0, dtype=torch.float32) -> TrainStep:
        config = LossConfig(schedule.prediction_type, alphas_cumprod(schedule).float(), gamma, offset, SCALING)
        precision = Precision(torch.device("cpu"), dtype)
        sync = prepare_unet(request.param, unet, lora, precision.device)
        return TrainStep(unet, lora, optimizer, config, precision, max_grad_norm, sync_compute_weights=sync)

    return make


def in_a_row(lora: Adapter) -> torch.Tensor:
    """A copy of all weights, module by module."""
    return torch.cat([part.flatten() for module in lora.modules for part in (module.down, module.up)])


class WholeGradient:
    """An optimizer that moves the weights by minus the gradient."""

    capturable = True

    def __init__(self, weights: torch.nn.Parameter):
        self.weights = weights

    def step(self, learning_rate: torch.Tensor, found_inf: torch.Tensor) -> None:
        assert not found_inf
        with torch.no_grad():
            self.weights -= learning_rate * self.weights.grad


@pytest.fixture
def observed(lora_unet, stepper) -> Callable[..., tuple[float, torch.Tensor, float]]:
    """A function of batches and options: loss, gradient of all LoRA weights in one row, and reported norm of one step."""

    def observe(batches, **options) -> tuple[float, torch.Tensor, float]:
        unet, lora = lora_unet()
        before = in_a_row(lora)
        result = stepper(unet, lora, WholeGradient(lora.weights), **options)(batches, learning_rate=1.0)
        assert not result.diverged
        return result.loss, before - in_a_row(lora), result.gradient_norm

    return observe


def reference(lora_unet, batch: Batch, schedule: Schedule, gamma: float, offset: float) -> tuple[float, torch.Tensor]:
    """The same loss and gradient, written out in float64: only the UNet itself is not."""
    unet, lora = lora_unet()  # as PEFT made it
    unet.double()
    root = [math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * t / 999 for t in range(1000)]
    shares = torch.tensor([1 - r * r for r in root], dtype=torch.float64).cumprod(0)
    if schedule.zero_terminal_snr:
        roots = shares.sqrt()
        shares = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    total = torch.zeros((), dtype=torch.float64)
    for i, t in enumerate(batch.timesteps.tolist()):
        mean, log_variance, eps, noise = (
            part[i].double() for part in (batch.mean, batch.log_variance, batch.latent_noise, batch.noise)
        )
        x = (mean + (log_variance / 2).exp() * eps) * SCALING
        n = noise + offset * batch.offset[i].double()
        a = shares[t]
        answer = unet(
            (a.sqrt() * x + (1 - a).sqrt() * n)[None],
            batch.timesteps[i],
            encoder_hidden_states=batch.hidden[i : i + 1].double(),
            added_cond_kwargs={"text_embeds": batch.pooled[i : i + 1].double(), "time_ids": batch.add_time_ids[i : i + 1].double()},
        ).sample[0]
        is_v = schedule.prediction_type == "v_prediction"
        wanted = a.sqrt() * n - (1 - a).sqrt() * x if is_v else n
        snr = (a / (1 - a)).item()
        weight = 1.0
        if gamma and is_v:
            weight = min(snr, gamma) / (snr + 1)
        elif gamma and snr:
            weight = min(snr, gamma) / snr
        mask = batch.mask[i].double() if batch.mask.numel() else 1.0
        total = total + weight * (mask * (answer - wanted) ** 2).mean() / len(batch.timesteps)
    total.backward()
    layers = [unet.get_submodule(module.name) for module in lora.modules]
    gradients = [part[ADAPTER].weight.grad.flatten() for layer in layers for part in (layer.lora_A, layer.lora_B)]
    return total.item(), torch.cat(gradients)


@pytest.mark.parametrize(
    ("schedule", "gamma", "offset", "timesteps"),
    [
        (PLAIN, 0.0, 0.0, [0, 700]),
        (PLAIN, 5.0, 0.0357, [20, 999]),
        (V, 0.0, 0.0, [1, 650]),
        (V, 5.0, 0.0357, [30, 999]),
        (V_ZERO, 0.0, 0.0, [500, 999]),
        (V_ZERO, 5.0, 0.0, [400, 999]),
        (Schedule("epsilon", zero_terminal_snr=True), 5.0, 0.0357, [10, 999]),
    ],
    ids=[
        "epsilon",
        "epsilon min-SNR offset",
        "v",
        "v min-SNR offset",
        "v zero-terminal",
        "v zero-terminal min-SNR",
        "eps zero-terminal",
    ],
)
def test_loss_and_gradient_are_those_of_the_formulas(lora_unet, schedule, gamma, offset, timesteps, observed):
    batch = batch_of(timesteps)
    loss, gradient, norm = observed([batch], schedule=schedule, gamma=gamma, offset=offset)
    expected_loss, expected = reference(lora_unet, batch, schedule, gamma, offset)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert norm == pytest.approx(expected.norm().item(), rel=1e-4)
    assert (gradient - expected).norm() < 2e-4 * expected.norm()  # float32 against float64


def test_masked_loss_and_gradient_are_those_of_the_formulas(lora_unet, observed):
    """Each pixel counts with the weight that its mask says, in either engine; a mask that is 1 everywhere changes nothing."""
    batch = batch_of([20, 700])
    mask = torch.ones(2, 1, 8, 8)
    mask[0, :, :, 4:] = 0.1
    mask[1, :, :3] = 0.5
    masked = replace(batch, mask=mask)
    loss, gradient, norm = observed([masked])
    expected_loss, expected = reference(lora_unet, masked, PLAIN, 5.0, 0.0357)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert norm == pytest.approx(expected.norm().item(), rel=1e-4)
    assert (gradient - expected).norm() < 2e-4 * expected.norm()
    plain_loss, plain, _ = observed([batch])
    assert (gradient - plain).norm() > 0.1 * plain.norm()
    same_loss, same, _ = observed([replace(batch, mask=torch.ones(2, 1, 8, 8))])
    assert same_loss == plain_loss
    assert torch.equal(same, plain)


def test_accumulated_micro_batches_are_one_batch(observed):
    """Two micro-batches of two samples, with what their shares in the step are, do exactly what one of four does."""
    batch = batch_of([50, 300, 600, 900])
    loss, gradient, norm = observed([batch])
    halves = [part_of(batch, 0, 2), part_of(batch, 2, 4)]
    accumulated_loss, accumulated, accumulated_norm = observed(halves)
    assert accumulated_loss == pytest.approx(loss, rel=1e-5)
    assert accumulated_norm == pytest.approx(norm, rel=1e-4)
    assert (accumulated - gradient).norm() < 1e-4 * gradient.norm()
    for parts in ([part_of(batch, 0, 2)], [part_of(batch, 2, 4)]):
        _, half, _ = observed(parts)
        assert (half - gradient).norm() > 0.1 * gradient.norm()


def test_padding_counts_nothing(observed):
    """A batch of two real samples and two of weight 0 gives what the two alone give, whatever the padding holds."""
    real = batch_of([50, 300])
    padded = replace(batch_of([50, 300, 600, 900]), weights=torch.tensor([0.5, 0.5, 0.0, 0.0]))
    loss, gradient, _ = observed([real])
    padded_loss, padded_gradient, _ = observed([padded])
    assert padded_loss == pytest.approx(loss, rel=1e-5)
    assert (padded_gradient - gradient).norm() < 1e-4 * gradient.norm()


def test_gradient_longer_than_the_limit_is_scaled_down_and_its_own_length_reported(observed):
    batch = batch_of([300])
    _, gradient, norm = observed([batch])
    _, clipped, reported = observed([batch], max_grad_norm=norm / 4)
    assert reported == pytest.approx(norm, rel=1e-4)
    assert clipped.norm().item() == pytest.approx(norm / 4, rel=1e-3)
    assert (4 * clipped - gradient).norm() < 1e-3 * gradient.norm()
    _, untouched, _ = observed([batch], max_grad_norm=4 * norm)
    assert (untouched - gradient).norm() < 1e-4 * gradient.norm()


def test_rate_of_the_step_is_the_one_that_it_is_given(lora_unet, stepper):
    """AdamW's first step moves every weight with a gradient by the rate."""
    unet, lora = lora_unet()
    before = in_a_row(lora)
    optimizer = AdamW(lora.weights, OptimizerSettings(weight_decay=0.0, adam_epsilon=1e-20))
    stepper(unet, lora, optimizer)([batch_of([300])], learning_rate=1e-3)
    moved = (before - in_a_row(lora)).abs()
    assert moved.max().item() == pytest.approx(1e-3, rel=1e-2)
    assert moved.median().item() == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("broken", ["mean", "hidden"])
def test_loss_that_is_not_finite_leaves_weights_and_moments_as_they_were_and_nothing_moves_them_after(lora_unet, broken, stepper):
    """The result of a step is read when the next one may have begun already: that one must change nothing either."""
    unet, lora = lora_unet()
    optimizer = AdamW(lora.weights, OptimizerSettings())
    step = stepper(unet, lora, optimizer, max_grad_norm=1.0)
    good, bad = batch_of([300]), batch_of([300])
    getattr(bad, broken)[0, 0] = float("nan")
    assert not step([good], 1e-3).diverged
    before, moments = in_a_row(lora), copy.deepcopy(optimizer.state_dict())
    result, following = step.begin([good, bad], 1e-3), step.begin([good], 1e-3)
    assert result().diverged
    assert math.isnan(result().loss)
    assert math.isfinite(following().loss)
    assert torch.equal(in_a_row(lora), before)
    assert all(torch.equal(tensor, moments[name]) for name, tensor in optimizer.state_dict().items())


def test_frozen_weights_stay_and_lora_weights_are_fp32(lora_unet, stepper):
    unet, lora = lora_unet()
    step = stepper(unet, lora, AdamW(lora.weights, OptimizerSettings()))
    assert lora.weights.dtype == torch.float32
    frozen = {name: weight.detach().clone() for name, weight in unet.named_parameters() if ".lora_" not in name}
    before = in_a_row(lora)
    step([batch_of([300])], 1e-2)
    assert len(frozen) > len(lora.modules)
    assert all(torch.equal(weight, frozen[name]) for name, weight in unet.named_parameters() if name in frozen)
    assert not torch.equal(in_a_row(lora), before)


def test_fp16_skips_steps_until_the_scale_of_the_loss_fits(plain_unet, stepper):
    """Skipped steps change no weight, and their loss is not reported as one."""
    unet = copy.deepcopy(plain_unet).half()
    lora = inject(unet, LoraSettings(lora_rank=4, lora_alpha=2.0), seed=7)
    step = stepper(unet, lora, AdamW(lora.weights, OptimizerSettings()), max_grad_norm=1.0, dtype=torch.float16)
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    batch, before = batch_of([100, 700]), in_a_row(lora)
    batch = replace(batch, hidden=batch.hidden.half(), pooled=batch.pooled.half())
    results = []
    while not results or results[-1].skipped:
        assert torch.equal(in_a_row(lora), before)
        results.append(step([batch], learning_rate=0.01))
    assert len(results) > 1
    assert not any(result.diverged for result in results)
    assert math.isfinite(results[-1].gradient_norm)
    assert not torch.equal(in_a_row(lora), before)
