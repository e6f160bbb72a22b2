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
from training.method.lora_l2 import l2_of_changes
from training.method.optimizer_wrappers import Ema
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
            module.zero.copy_(0.1 * torch.randn(module.zero.shape, generator=generator))
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

    def make(
        unet,
        lora,
        optimizer,
        schedule=PLAIN,
        gamma=5.0,
        offset=0.0357,
        max_grad_norm=0.0,
        dtype=torch.float32,
        pull=None,
        **objective,
    ) -> TrainStep:
        config = LossConfig(schedule.prediction_type, alphas_cumprod(schedule).float(), gamma, offset, SCALING, **objective)
        precision = Precision(torch.device("cpu"), dtype)
        sync = prepare_unet(request.param, unet, lora, precision.device)
        how = {"add_gradient": pull, "sync_compute_weights": sync}
        return TrainStep(unet, lora, optimizer, config, precision, max_grad_norm, **how)

    return make


def in_a_row(lora: Adapter) -> torch.Tensor:
    """A copy of all weights, module by module."""
    return torch.cat([part.flatten() for module in lora.modules for part in module.factors.values()])


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


def reference(
    lora_unet,
    batch: Batch,
    schedule: Schedule,
    gamma: float,
    offset: float,
    loss: str = "mse",
    weighting: str = "min_snr",
    without_lora: UNet2DConditionModel | None = None,
) -> tuple[float, torch.Tensor]:
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
        if weighting == "debiased":
            weight = 1 / (min(snr, 1000) + 1) if is_v else min(snr, 1000) ** -0.5
        error = (answer - wanted) ** 2
        if loss == "huber_snr":
            c = 0.9 / (1 + snr**-0.5) ** 2 + 0.1
            error = 2 * c * ((error + c * c).sqrt() - c)
        total = total + weight * (mask * error).mean() / len(batch.timesteps)
        for number in (n for n, row in enumerate(batch.prior_rows.tolist()) if row == i):
            caption = {
                "encoder_hidden_states": batch.prior_hidden[number : number + 1].double(),
                "added_cond_kwargs": {
                    "text_embeds": batch.prior_pooled[number : number + 1].double(),
                    "time_ids": batch.add_time_ids[i : i + 1].double(),
                },
            }
            noisy = ((a.sqrt() * x + (1 - a).sqrt() * n)[None], batch.timesteps[i])
            change = unet(*noisy, **caption).sample - without_lora(*noisy, **caption).sample
            total = total + batch.prior_weights[number].item() * change.square().mean()
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


@pytest.mark.parametrize("schedule", [PLAIN, V], ids=["epsilon", "v"])
def test_other_losses_and_weightings_are_those_of_the_formulas(lora_unet, schedule, observed):
    batch, objective = batch_of([5, 400, 990]), {"loss": "huber_snr", "weighting": "debiased"}
    loss, gradient, _ = observed([batch], schedule=schedule, **objective)
    expected_loss, expected = reference(lora_unet, batch, schedule, 5.0, 0.0357, **objective)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert (gradient - expected).norm() < 2e-4 * expected.norm()


def with_prior(batch: Batch) -> Batch:
    """Two of its samples, with other captions, are to be predicted as by the base model."""
    rows, generator = [2, 0], torch.Generator().manual_seed(5)
    hidden, pooled = (torch.randn(len(rows), *part.shape[1:], generator=generator) for part in (batch.hidden, batch.pooled))
    return replace(
        batch, prior_rows=torch.tensor(rows), prior_hidden=hidden, prior_pooled=pooled, prior_weights=torch.tensor([40.0, 25.0])
    )


def test_what_remains_of_the_base_model_is_that_of_the_formula(lora_unet, plain_unet, observed):
    """weight x mean of (prediction with the LoRA - prediction of the base model)^2, whose gradient is that of the former."""
    batch = batch_of([50, 300, 600])
    loss, gradient, _ = observed([with_prior(batch)])
    without_lora = copy.deepcopy(plain_unet).double()
    expected_loss, expected = reference(lora_unet, with_prior(batch), PLAIN, 5.0, 0.0357, without_lora=without_lora)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert (gradient - expected).norm() < 2e-4 * expected.norm()
    plain_loss, plain_gradient, _ = observed([batch])
    assert loss > 1.05 * plain_loss
    assert (gradient - plain_gradient).norm() > 0.05 * gradient.norm()


def test_pull_to_the_base_model_is_part_of_the_gradient_that_is_reported_and_clipped(lora_unet, stepper):
    gradients = []
    for weight in (0.0, 0.3):
        unet, lora = lora_unet()
        before = in_a_row(lora)
        pull = l2_of_changes(lora, weight) if weight else None
        result = stepper(unet, lora, WholeGradient(lora.weights), pull=pull)([batch_of([300])], learning_rate=1.0)
        gradients.append(before - in_a_row(lora))
        assert result.gradient_norm == pytest.approx(gradients[-1].norm().item(), rel=1e-4)
    _, lora = lora_unet()
    l2_of_changes(lora, 0.3)()
    expected = torch.cat(
        [
            lora.layers[m.name].get_submodule(part)[ADAPTER].weight.grad.flatten()
            for m in lora.modules
            for part in ("lora_A", "lora_B")
        ]
    )
    assert expected.norm() > 0.1 * gradients[0].norm()
    assert (gradients[1] - gradients[0] - expected).norm() < 1e-5 * gradients[1].norm()


KINDS = [("plain", "lora"), ("plain", "dora"), ("plain", "loha"), ("plain", "lokr"), ("fast", "lora")]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_the_adapter_can_be_left_out_for_one_prediction(plain_unet, name, kind):
    """Also in the middle of training: the same weights are trained afterwards."""
    unet = copy.deepcopy(plain_unet)
    lora = inject(unet, LoraSettings(lora_rank=4, lora_alpha=2.0, lora_type=kind), seed=7)
    for module in lora.modules:
        module.zero.fill_(0.05)
    sync = prepare_unet(name, unet, lora, torch.device("cpu"))
    config = LossConfig("epsilon", alphas_cumprod(PLAIN).float(), 5.0, 0.0, SCALING)
    optimizer = AdamW(lora.weights, OptimizerSettings())
    step = TrainStep(unet, lora, optimizer, config, Precision(torch.device("cpu"), torch.float32), 0.0, sync_compute_weights=sync)
    batch = batch_of([300])
    inputs = batch.noise, batch.timesteps, batch.add_time_ids, batch.hidden, batch.pooled
    step.sync_compute_weights()
    before = step.predict(*inputs).detach()
    conditions = {"text_embeds": batch.pooled, "time_ids": batch.add_time_ids}
    expected = plain_unet(batch.noise, batch.timesteps, batch.hidden, added_cond_kwargs=conditions).sample
    assert (step.predict_without_adapter(*inputs) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (before - expected).abs().max() > 1e-3 * expected.abs().max()
    assert torch.equal(step.predict(*inputs), before)
    changed = lora.weights.detach().clone()
    step([batch], learning_rate=1e-2)
    assert (lora.weights != changed).double().mean() > 0.99


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


def test_the_loss_of_each_sample_is_reported(lora_unet, stepper):
    """Unweighted, in the order of the batches, without padding; of a masked sample the mean over its mask."""
    first, second = batch_of([20, 700]), batch_of([999, 300], seed=1)
    mask = torch.ones(2, 1, 8, 8)
    mask[0, :, :, 4:] = 0.1
    first, second = replace(first, mask=mask), replace(second, mask=torch.ones(2, 1, 8, 8), weights=torch.tensor([0.5, 0.0]))
    unet, lora = lora_unet()
    result = stepper(unet, lora, WholeGradient(lora.weights))([first, second], learning_rate=1.0)
    alone = [(first, 0), (first, 1), (second, 0)]
    expected = []
    for batch, index in alone:
        part = replace(part_of(batch, index, index + 1), weights=torch.ones(1))
        loss, _ = reference(lora_unet, part, PLAIN, 0.0, 0.0357)
        expected.append((int(part.timesteps), pytest.approx(loss / part.mask.mean().item(), rel=1e-5)))
    assert list(result.samples) == expected


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


def test_regularization_images_add_their_mean_loss_times_the_prior_weight(lora_unet, observed):
    """DreamBooth's loss; the images of the class have another shape than the others."""
    examples, priors = batch_of([20, 999]), batch_of([400, 70], seed=1)
    sides = ("mean", "log_variance", "latent_noise", "noise")
    wider = {name: torch.cat([getattr(priors, name), getattr(priors, name).flip(0)], dim=-1) for name in sides}
    priors = replace(priors, **wider)
    loss, gradient, norm = observed([examples, replace(priors, weights=0.3 * priors.weights)], gamma=5.0, offset=0.0357)
    (first_loss, first), (second_loss, second) = (reference(lora_unet, batch, PLAIN, 5.0, 0.0357) for batch in (examples, priors))
    expected = first + 0.3 * second
    assert loss == pytest.approx(first_loss + 0.3 * second_loss, rel=1e-5)
    assert norm == pytest.approx(expected.norm().item(), rel=1e-4)
    assert (gradient - expected).norm() < 2e-4 * expected.norm()


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


def test_averaged_weights_are_evaluated_and_training_goes_on_from_its_own(lora_unet, stepper):
    batch = batch_of([300])
    losses = []
    for looks in (True, False):
        unet, lora = lora_unet()
        optimizer = Ema(AdamW(lora.weights, OptimizerSettings()), lora.weights, decay=0.9)
        step = stepper(unet, lora, optimizer)
        for _ in range(3):
            step([batch], learning_rate=0.05)
        if looks:
            trained, plain = in_a_row(lora), step.evaluate([batch])
            with step.averaged():
                assert torch.equal(lora.weights, optimizer.averaged_weights())
                assert not torch.equal(in_a_row(lora), trained)
                assert step.evaluate([batch]) != plain
            assert torch.equal(in_a_row(lora), trained)
            assert step.evaluate([batch]) == plain
        losses.append([step([batch], learning_rate=0.05).loss for _ in range(2)])
    assert losses[0] == losses[1]


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


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_dropout_follows_from_the_noise_and_is_off_in_evaluations(plain_unet, kind):
    """The same step has the same masks, with gradient checkpointing too; another step has others; and predictions have none."""

    def gradient_of(seed: int, dropout: float = 0.5, checkpointing: bool = False) -> torch.Tensor:
        unet = copy.deepcopy(plain_unet)
        lora = inject(unet, LoraSettings(lora_rank=4, lora_alpha=2.0, lora_type=kind, lora_dropout=dropout), seed=7)
        generator = torch.Generator().manual_seed(1)
        for module in lora.modules:
            module.zero.copy_(0.1 * torch.randn(module.zero.shape, generator=generator))
        sync = prepare_unet("plain", unet, lora, torch.device("cpu"), gradient_checkpointing=checkpointing)
        config = LossConfig("epsilon", alphas_cumprod(PLAIN).float(), 5.0, 0.0, SCALING)
        precision = Precision(torch.device("cpu"), torch.float32)
        step = TrainStep(unet, lora, WholeGradient(lora.weights), config, precision, 0.0, sync_compute_weights=sync)
        evaluated.append(step.evaluate([batch_of([300, 700], seed)]))
        before = in_a_row(lora)
        step([batch_of([300, 700], seed)], learning_rate=1.0)
        return before - in_a_row(lora)

    evaluated: list[float] = []
    first, again, recomputed, other, without = (
        gradient_of(*arguments) for arguments in ((1,), (1,), (1, 0.5, True), (2,), (1, 0.0))
    )
    assert torch.equal(first, again)
    torch.testing.assert_close(recomputed, first, rtol=1e-4, atol=1e-6)
    assert (first - other).norm() > 0.1 * first.norm()
    assert (first - without).norm() > 0.1 * without.norm()
    assert evaluated[0] == evaluated[1] == evaluated[4]


def test_dropout_is_that_of_torch(plain_unet):
    """Of a LoRA's input a share is 0 and the rest is scaled up, so that its mean stays."""
    lora = inject(copy.deepcopy(plain_unet), LoraSettings(lora_rank=4, lora_dropout=0.25), seed=0)
    layer = next(iter(lora.layers.values()))
    ones = torch.ones(4, 1000, layer.in_features)
    with lora.dropping():
        dropped = layer.lora_dropout[ADAPTER](ones)
    assert (dropped == 0).float().mean() == pytest.approx(0.25, abs=0.01)
    assert dropped.max() == pytest.approx(1 / 0.75)
    assert torch.equal(layer.lora_dropout[ADAPTER](ones), ones)


def test_a_lora_of_one_image_lowers_its_loss_under_noise_that_training_never_had(lora_unet, stepper):
    """And it learns that image: under the same noise, the loss of another one falls less. The UNet is random, so that most of what
    there is to learn is the same for all images."""

    def views(image: int, noise: int) -> Batch:
        """One image with its caption, under four noises at four timesteps."""
        of_image, of_noise = batch_of([0], seed=image), batch_of([150, 350, 550, 750], seed=noise)
        same = ("mean", "log_variance", "hidden", "pooled", "add_time_ids")
        return replace(of_noise, **{name: getattr(of_image, name).repeat_interleave(4, 0) for name in same})

    unet, lora = lora_unet()
    step = stepper(unet, lora, AdamW(lora.weights, OptimizerSettings()), gamma=0.0, offset=0.0)
    before = {image: step.evaluate([views(image, noise=1)]) for image in (1, 2)}
    for number in range(60):
        step([views(1, noise=100 + number)], learning_rate=1e-2)
    after = {image: step.evaluate([views(image, noise=1)]) for image in (1, 2)}
    assert after[1] < 0.7 * before[1]
    assert after[1] / before[1] < 0.95 * after[2] / before[2]
