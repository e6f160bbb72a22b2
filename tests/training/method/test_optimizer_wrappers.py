"""LoRA+ and the average of the weights, against torch's own AdamW and against the formula."""

import pytest
import safetensors.torch
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from training.config import LoraSettings, OptimizerSettings
from training.method.adapters import ADAPTER, Adapter, inject
from training.method.optimizer_wrappers import floats_per_weight, make_optimizer
from training.method.optimizers import OPTIMIZERS, Optimizer


@pytest.fixture(scope="module")
def new_adapter():
    """A function that makes the LoRA of a small UNet."""

    def make(kind: str = "lora", conv_rank: int = 0) -> Adapter:
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), block_out_channels=(32,),
            layers_per_block=1, attention_head_dim=2, cross_attention_dim=16, use_linear_projection=True,
        )  # fmt: skip
        return inject(unet.requires_grad_(False), LoraSettings(lora_rank=4, lora_type=kind, lora_conv_rank=conv_rank), seed=7)

    return make


def train(adapter: Adapter, optimizer: Optimizer, steps: range, rate: float = 1e-3) -> list[torch.Tensor]:
    """Steps with gradients that depend on the step alone; returns the weights after each of them."""
    weights = []
    for step in steps:
        adapter.sums[:-1].copy_(torch.randn(len(adapter.weights), generator=torch.Generator().manual_seed(step)))
        optimizer.step(torch.tensor(rate), torch.tensor(0.0))
        weights.append(adapter.weights.detach().clone())
    return weights


@pytest.mark.parametrize("kind", [("lora",), ("dora",), ("lora", 2)], ids=str)
def test_lora_plus_is_adamw_with_two_rates(new_adapter, kind):
    adapter, other = new_adapter(*kind), new_adapter(*kind)
    train(adapter, make_optimizer(adapter, OptimizerSettings(loraplus_ratio=16.0, weight_decay=0.1)), range(20))
    layers = other.layers.values()
    ups = [layer.lora_B[ADAPTER].weight for layer in layers]
    rest = [each for layer in layers for each in layer.parameters() if each.requires_grad and not any(each is up for up in ups)]
    assert sum(each.numel() for each in [*ups, *rest]) == len(other.weights)
    groups = [{"params": rest, "lr": 1e-3}, {"params": ups, "lr": 16e-3}]
    train(other, Torch(torch.optim.AdamW(groups, weight_decay=0.1)), range(20))
    assert (adapter.weights - other.weights).abs().max() < 2e-6
    assert (adapter.weights - new_adapter(*kind).weights).abs().max() > 0.1


class Torch:
    """An optimizer of torch, which has its own rates."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer

    def step(self, learning_rate: torch.Tensor, found_inf: torch.Tensor) -> None:
        self.optimizer.step()


def test_average_of_the_weights_is_the_formula(new_adapter):
    """decay_n = min(decay, (1 + n) / (10 + n)), number by number in float64."""
    adapter = new_adapter()
    expected = adapter.weights.detach().double()
    optimizer = make_optimizer(adapter, OptimizerSettings(ema_decay=0.75))
    for number, weights in enumerate(train(adapter, optimizer, range(40))):
        decay = min(0.75, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * weights.double()
    assert decay == 0.75
    assert (optimizer.averaged_weights() - expected).abs().max() < 1e-7
    assert (optimizer.averaged_weights() - adapter.weights).abs().max() > 1e-3


SETTINGS = {
    "lora+": {"loraplus_ratio": 4.0},
    "average": {"ema_decay": 0.9},
    "both": {"loraplus_ratio": 4.0, "ema_decay": 0.9},
    "average of prodigy": {"optimizer": "prodigy", "learning_rate": 1.0, "ema_decay": 0.9},
}


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_a_run_continues_exactly_from_its_state(new_adapter, changes):
    settings = OptimizerSettings(**changes)
    whole, first, second = new_adapter(), new_adapter(), new_adapter()
    optimizer, stopped, resumed = (make_optimizer(each, settings) for each in (whole, first, second))
    train(whole, optimizer, range(12))
    train(first, stopped, range(5))
    resumed.load_state_dict(safetensors.torch.load(safetensors.torch.save(stopped.state_dict())))
    second.weights.detach().copy_(first.weights)
    train(second, resumed, range(5, 12))
    assert torch.equal(second.weights, whole.weights)
    averages = resumed.averaged_weights(), optimizer.averaged_weights()
    assert averages == (None, None) or torch.equal(*averages)


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_a_broken_step_changes_nothing(new_adapter, changes):
    adapter = new_adapter()
    optimizer = make_optimizer(adapter, OptimizerSettings(**changes))
    train(adapter, optimizer, range(3))
    before = {"weights": adapter.weights.detach(), **optimizer.state_dict()}
    before = {name: tensor.clone() for name, tensor in before.items()}
    adapter.sums.fill_(float("nan"))
    optimizer.step(torch.tensor(1e-3), torch.tensor(1.0))
    after = {"weights": adapter.weights.detach(), **optimizer.state_dict()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_nothing_is_put_around_an_optimizer_by_default(new_adapter):
    assert type(make_optimizer(new_adapter(), OptimizerSettings())) is OPTIMIZERS["adamw"]


@pytest.mark.parametrize("changes", [{}, *SETTINGS.values()], ids=["default", *SETTINGS])
def test_memory_of_the_state_is_what_is_budgeted(new_adapter, changes):
    settings = OptimizerSettings(**changes)
    adapter = new_adapter()
    state = sum(tensor.numel() for tensor in make_optimizer(adapter, settings).state_dict().values())
    working = len(adapter.weights) if settings.loraplus_ratio != 1 else 0  # the weights before a step are no state
    assert (state + working) / len(adapter.weights) == pytest.approx(floats_per_weight(settings), rel=0.01)
