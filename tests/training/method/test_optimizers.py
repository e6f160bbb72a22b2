"""The learning rate, counted in optimizer steps, and AdamW against its formulas."""

import math
import typing

import diffusers.optimization
import pytest
import safetensors.torch
import torch

from training.config import OptimizerSettings
from training.method.optimizers import OPTIMIZERS, Adafactor, AdamW, Optimizer, ScheduleFree, Scheduler, learning_rate_at
from training.method.prodigy import FIRST_ESTIMATE, Prodigy


def rates(scheduler: str, warmup: float, steps: int = 10, **numbers) -> list[float]:
    return [learning_rate_at(step, steps, 2e-4, scheduler, math.ceil(warmup * steps), **numbers) for step in range(steps)]


def test_constant_rate_is_the_peak_from_the_first_step_on():
    assert rates("constant", 0) == [2e-4] * 10


def test_warm_up_rises_from_zero_and_its_last_step_has_the_peak():
    assert rates("constant", 0.4) == pytest.approx([0.5e-4, 1e-4, 1.5e-4, *[2e-4] * 7], rel=1e-12)


def test_linear_rate_would_be_zero_after_the_last_step():
    assert rates("linear", 0.2) == pytest.approx([1e-4, 2e-4, *(2e-4 * (8 - i) / 8 for i in range(8))], rel=1e-12)


def test_cosine_is_half_a_wave_from_the_peak_to_zero():
    expected = [1e-4, 2e-4, *(1e-4 * (1 + math.cos(math.pi * i / 8)) for i in range(8))]
    assert rates("cosine", 0.2) == pytest.approx(expected, rel=1e-12)
    assert rates("cosine", 0)[5] == pytest.approx(1e-4, rel=1e-12)


@pytest.mark.parametrize(
    ("scheduler", "numbers"),
    [
        ("cosine_with_restarts", {"num_cycles": 3}),
        ("cosine_with_restarts", {"num_cycles": 7}),
        ("polynomial", {"power": 2.0, "lr_end": 0.0}),
        ("polynomial", {"power": 0.5, "lr_end": 0.0}),
    ],
)
def test_other_rates_are_those_of_diffusers_after_the_warm_up(scheduler, numbers):
    """Its warm-up is one step late: it begins with a rate of 0."""
    functions = diffusers.optimization.TYPE_TO_SCHEDULER_FUNCTION
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-4)
    theirs = functions[diffusers.optimization.SchedulerType(scheduler)](optimizer, 10, 97, **numbers)
    names = {"cycles": numbers.get("num_cycles", 1), "power": numbers.get("power", 1.0)}
    ours = [learning_rate_at(step, 97, 2e-4, scheduler, 10, **names) for step in range(10, 97)]
    assert ours == pytest.approx([2e-4 * theirs.lr_lambdas[0](step) for step in range(10, 97)], rel=1e-9)
    assert len(set(ours)) > 20


def test_stable_rate_falls_on_a_line_over_the_last_steps():
    expected = [1e-4, 2e-4, 2e-4, 2e-4, 2e-4, 2e-4, 2e-4, *(2e-4 * left / 4 for left in (3, 2, 1))]
    assert rates("warmup_stable_decay", 0.2, decay=0.4) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scheduler", typing.get_args(Scheduler))
def test_every_rate_of_every_run_lies_between_zero_and_the_peak(scheduler):
    for steps in (1, 2, 3, 19, 1000):
        for warmup in (0, 0.05, 0.5, 1):
            found = rates(scheduler, warmup, steps, cycles=3, power=2.0, decay=0.2)
            assert all(0 < rate <= 2e-4 for rate in found)


def test_a_part_of_a_warm_up_step_is_a_whole_one():
    assert rates("constant", 0.05, 21)[:3] == pytest.approx([1e-4, 2e-4, 2e-4], rel=1e-12)


def test_adamw_is_what_its_paper_says():
    """Loshchilov & Hutter 2019, Algorithm 2, number by number, with every setting in its place."""
    settings = OptimizerSettings(weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-3)
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = AdamW(weight, settings)
    ours, first, second = [1.0, -2.0], [0.0, 0.0], [0.0, 0.0]
    for step, gradient in enumerate(([0.5, -1.0], [2.0, 0.25], [-0.125, 0.0]), start=1):
        weight.grad = torch.tensor(gradient)
        optimizer.step(torch.tensor(0.01))
        for i, g in enumerate(gradient):
            first[i] = 0.8 * first[i] + 0.2 * g
            second[i] = 0.95 * second[i] + 0.05 * g * g
            update = (first[i] / (1 - 0.8**step)) / (math.sqrt(second[i] / (1 - 0.95**step)) + 1e-3)
            ours[i] -= 0.01 * (update + 0.1 * ours[i])
        assert weight.tolist() == pytest.approx(ours, rel=1e-6)


QUADRATIC = torch.linspace(-1, 1, 60)
"""What the weights of the tests below should become."""


def weights_of(start: torch.Tensor) -> torch.nn.Parameter:
    weights = torch.nn.Parameter(start.clone())
    weights.grad = torch.zeros_like(weights)
    return weights


def train(weights: torch.nn.Parameter, optimizer: Optimizer, steps: range, rate: float = 1.0) -> None:
    """Steps whose gradients depend on weights and step alone."""
    for step in steps:
        noise = torch.randn(weights.shape, generator=torch.Generator().manual_seed(step))
        weights.grad.copy_(2 * (weights.detach() - QUADRATIC) + 0.3 * noise)
        optimizer.step(torch.tensor(rate))


def as_prodigyopt(weights: torch.nn.Parameter, settings: OptimizerSettings):
    """The package's optimizer, with the options that its README recommends for diffusion models."""
    package = pytest.importorskip("prodigyopt")
    betas = settings.adam_beta1, settings.adam_beta2
    return package.Prodigy(
        [weights],
        betas=betas,
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        safeguard_warmup=True,
        use_bias_correction=True,
    )


@pytest.mark.parametrize(
    "changes", [{}, {"weight_decay": 0.0}, {"adam_beta1": 0.8}, {"adam_beta2": 0.99}, {"adam_epsilon": 1e-4}], ids=str
)
def test_prodigy_takes_the_steps_of_prodigyopt(changes):
    """A LoRA of one layer, whose `up` begins at 0, on changing batches, with a warm-up: 200 steps, each within 1e-6."""
    settings = OptimizerSettings(optimizer="prodigy", learning_rate=1.0, **changes)
    generator = torch.Generator().manual_seed(0)
    inputs, wanted = torch.randn(256, 40, generator=generator), torch.randn(24, 40, generator=generator)
    start = torch.cat([torch.randn(320, generator=generator) / 40**0.5, torch.zeros(192)])
    ours, theirs = weights_of(start), weights_of(start)
    optimizer, package = Prodigy(ours, settings), as_prodigyopt(theirs, settings)
    for step in range(200):
        rate = min(1.0, (step + 1) / 20)
        rows = inputs[torch.randint(0, 256, (32,), generator=generator)]
        for weights in (ours, theirs):
            down, up = weights[:320].view(8, 40), weights[320:].view(24, 8)
            loss = ((rows @ down.T @ up.T - rows @ wanted.T) ** 2).mean()
            weights.grad = torch.autograd.grad(loss, weights)[0]
        optimizer.step(torch.tensor(rate))
        package.param_groups[0]["lr"] = rate
        package.step()
        assert (ours - theirs).norm() < 1e-6 * theirs.norm()
    estimate = package.param_groups[0]["d"]
    assert estimate > 1000 * FIRST_ESTIMATE
    assert optimizer.state_dict()["d"].item() == pytest.approx(estimate, rel=1e-5)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_prodigy_finds_a_rate_by_itself(scale):
    """With a rate of 1, whatever the size of weights and gradients is."""
    weights = weights_of(torch.zeros(60))
    optimizer = Prodigy(weights, OptimizerSettings())
    for step in range(300):
        noise = torch.randn(60, generator=torch.Generator().manual_seed(step))
        weights.grad.copy_(2 * (weights.detach() - scale * QUADRATIC) + 0.3 * scale * noise)
        optimizer.step(torch.tensor(1.0))
    assert (weights / scale - QUADRATIC).norm() < 0.2 * QUADRATIC.norm()


def test_prodigy_takes_no_step_without_a_gradient():
    weights = weights_of(torch.ones(4))
    optimizer = Prodigy(weights, OptimizerSettings())
    before = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    optimizer.step(torch.tensor(1.0))
    assert torch.equal(weights, torch.ones(4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in optimizer.state_dict().items())


def test_schedule_free_is_the_packages_and_asking_for_its_average_changes_nothing():
    package = pytest.importorskip("schedulefree")
    settings = OptimizerSettings(optimizer="schedulefree")
    ours, theirs = weights_of(torch.zeros(60)), weights_of(torch.zeros(60))
    optimizer = ScheduleFree(ours, settings)
    other = package.AdamWScheduleFree([theirs], weight_decay=settings.weight_decay)
    other.train()
    assert optimizer.averaged_weights() is None  # before the first step there is nothing to average
    for step in range(50):
        train(ours, optimizer, range(step, step + 1), rate=0.01)
        optimizer.averaged_weights()
        other.param_groups[0]["lr"] = torch.tensor(0.01).item()
        noise = torch.randn(60, generator=torch.Generator().manual_seed(step))
        theirs.grad.copy_(2 * (theirs.detach() - QUADRATIC) + 0.3 * noise)
        other.step()
    assert torch.equal(ours, theirs)
    other.eval()
    assert not torch.equal(ours, theirs)
    assert torch.equal(optimizer.averaged_weights(), theirs)


def test_adafactor_is_the_packages_on_each_matrix():
    """Of the flat weights as one vector, it would keep as many second moments as there are weights."""
    from transformers import Adafactor as Package

    start, settings = torch.randn(60, generator=torch.Generator().manual_seed(0)), OptimizerSettings(weight_decay=0.1)
    flat, shapes = weights_of(start), ((8, 5), (5, 4))
    optimizer = Adafactor(matrices_of(flat, shapes), settings)
    other = weights_of(start)
    package = Package(matrices_of(other, shapes), lr=1e-3, scale_parameter=False, relative_step=False, weight_decay=0.1)
    for step in range(20):
        train(flat, optimizer, range(step, step + 1), rate=1e-3)
        package.param_groups[0]["lr"] = torch.tensor(1e-3).item()
        other.grad.copy_(2 * (other.detach() - QUADRATIC) + 0.3 * torch.randn(60, generator=torch.Generator().manual_seed(step)))
        package.step()
    assert torch.equal(flat, other)
    assert not torch.equal(flat, start)
    kept = sum(tensor.numel() for name, tensor in optimizer.state_dict().items() if "exp_avg" in name)
    assert kept == 8 + 5 + 5 + 4


def matrices_of(flat: torch.nn.Parameter, shapes) -> list[torch.nn.Parameter]:
    """Parameters that are views of `flat`, with gradients that are views of its gradient."""
    parameters, first = [], 0
    for rows, columns in shapes:
        last = first + rows * columns
        parameters.append(torch.nn.Parameter(flat.detach()[first:last].view(rows, columns)))
        parameters[-1].grad = flat.grad[first:last].view(rows, columns)
        first = last
    return parameters


def made(name: str, start: torch.Tensor) -> tuple[torch.nn.Parameter, Optimizer]:
    """Weights that begin at `start`, and the optimizer `name` for them."""
    if name == "schedulefree":
        pytest.importorskip("schedulefree")
    weights = weights_of(start)
    updated = matrices_of(weights, ((12, 5),)) if name == "adafactor" else weights
    return weights, OPTIMIZERS[name](updated, OptimizerSettings(optimizer=name))


ON_A_CPU = sorted(OPTIMIZERS.keys() - {"adamw8bit"})


@pytest.mark.parametrize("name", ON_A_CPU)
def test_every_optimizer_continues_exactly_from_its_state(name):
    """Through a file: numbers that a package keeps as numbers of Python come back at full precision."""
    start = torch.randn(60, generator=torch.Generator().manual_seed(1))
    whole, optimizer = made(name, start)
    train(whole, optimizer, range(40), rate=0.5)
    first, stopped = made(name, start)
    train(first, stopped, range(15), rate=0.5)
    assert not torch.equal(first, whole)
    stored = safetensors.torch.save({tensor: value.contiguous() for tensor, value in stopped.state_dict().items()})
    second, resumed = made(name, first.detach())
    resumed.load_state_dict(safetensors.torch.load(stored))
    train(second, resumed, range(15, 40), rate=0.5)
    assert torch.equal(second, whole)
    averages = resumed.averaged_weights(), optimizer.averaged_weights()
    assert averages == (None, None) or torch.equal(*averages)


@pytest.mark.parametrize("name", ON_A_CPU)
def test_a_broken_step_changes_nothing(name):
    """Not even a state that a later checkpoint would hold."""
    weights, optimizer = made(name, torch.ones(60))
    train(weights, optimizer, range(3), rate=0.25)
    before, state = weights.detach().clone(), {key: value.clone() for key, value in optimizer.state_dict().items()}
    weights.grad.fill_(float("nan"))
    optimizer.step(torch.tensor(0.25), torch.tensor(1.0))
    assert torch.equal(weights, before)
    after = optimizer.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in after.items())
    weights.grad.fill_(1.0)
    optimizer.step(torch.tensor(0.25), torch.tensor(0.0))
    assert weights.isfinite().all()
    assert not torch.equal(weights, before)
