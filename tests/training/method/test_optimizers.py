"""The learning rate, counted in optimizer steps, and AdamW against its formulas."""

import math

import pytest
import torch

from training.config import OptimizerSettings
from training.method.optimizers import AdamW, Prodigy, learning_rate_at


def rates(scheduler: str, warmup: float, steps: int = 10) -> list[float]:
    return [learning_rate_at(step, steps, 2e-4, scheduler, math.ceil(warmup * steps)) for step in range(steps)]


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


@pytest.mark.parametrize("scheduler", ["constant", "linear", "cosine"])
def test_every_rate_of_every_run_lies_between_zero_and_the_peak(scheduler):
    for steps in (1, 2, 3, 19, 1000):
        for warmup in (0, 0.05, 0.5, 1):
            assert all(0 < rate <= 2e-4 for rate in rates(scheduler, warmup, steps))


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


def test_prodigy_continues_exactly_from_its_state():
    """Numbers that it keeps for the whole group, such as its estimate of the rate, are part of the state."""
    pytest.importorskip("prodigyopt")
    settings = OptimizerSettings(optimizer="prodigy", learning_rate=1.0)

    def step(weight: torch.nn.Parameter, optimizer: Prodigy, count: int) -> None:
        for _ in range(count):
            weight.grad = 2 * (weight.detach() - torch.arange(4.0))
            optimizer.step(torch.tensor(1.0))

    whole = torch.nn.Parameter(torch.full((4,), 0.5))
    optimizer = Prodigy(whole, settings)
    step(whole, optimizer, 40)
    first = torch.nn.Parameter(torch.full((4,), 0.5))
    stopped = Prodigy(first, settings)
    step(first, stopped, 15)
    state = stopped.state_dict()
    assert {"group.d", "group.d_max", "group.d_numerator", "group.k", "s", "p0", "exp_avg", "exp_avg_sq", "step"} <= state.keys()
    second = torch.nn.Parameter(first.detach().clone())
    resumed = Prodigy(second, settings)
    resumed.load_state_dict(state)
    step(second, resumed, 25)
    assert torch.equal(second, whole)
    assert not torch.equal(first, whole)


def test_a_library_optimizer_takes_the_rate_and_skips_broken_steps():
    pytest.importorskip("prodigyopt")
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = Prodigy(weight, OptimizerSettings(optimizer="prodigy", learning_rate=1.0))
    weight.grad = torch.ones(3)
    optimizer.step(torch.tensor(0.25), torch.tensor(1.0))
    assert torch.equal(weight, torch.ones(3))
    optimizer.step(torch.tensor(0.25), torch.tensor(0.0))
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert not torch.equal(weight, torch.ones(3))
