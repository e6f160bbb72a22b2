"""What can be put around an optimizer: another rate for text encoders, LoRA+, and an average of the weights. All can be captured if
the optimizer can."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from training.config import OptimizerSettings
from training.method.adapters import ADAPTER, Adapter
from training.method.layers import network_of
from training.method.optimizers import OPTIMIZERS, LibraryOptimizer, Optimizer


def make_optimizer(adapter: Adapter, settings: OptimizerSettings) -> Optimizer:
    """The optimizer of `settings` for the weights of `adapter`, with everything around it. The weights have the values from which
    training begins: prodigy and the average keep them."""
    if adapter.unet_weights == len(adapter.weights):
        optimizer = _optimizer_of(adapter.weights, adapter.layers.values(), settings)
    else:
        optimizer = _with_text_encoders(adapter, settings)
    if settings.loraplus_ratio != 1:
        ups = [layer.lora_B[ADAPTER].weight.detach() for layer in adapter.layers.values()]
        optimizer = LoraPlus(optimizer, adapter.weights, ups, settings.loraplus_ratio)
    return Ema(optimizer, adapter.weights, settings.ema_decay) if settings.ema_decay else optimizer


def _optimizer_of(weights: torch.nn.Parameter, layers: Iterable[BaseTunerLayer], settings: OptimizerSettings) -> Optimizer:
    """The optimizer of `settings` for these `weights`, those of `layers`."""
    kind = OPTIMIZERS[settings.optimizer]
    if issubclass(kind, LibraryOptimizer) and kind.by_matrix:
        return kind([each for layer in layers for each in layer.parameters() if each.requires_grad], settings)
    return kind(weights, settings)


def _with_text_encoders(adapter: Adapter, settings: OptimizerSettings) -> Optimizer:
    """The same for an adapter of text encoders, and of the UNet if any of its layers is adapted."""
    first, parts = adapter.unet_weights, {}
    rates = {"unet": (slice(first), settings.learning_rate), "text_encoders": (slice(first, None), settings.text_encoder_lr)}
    for name, (part, rate) in rates.items():
        weights = torch.nn.Parameter(adapter.weights.detach()[part])
        weights.grad = adapter.weights.grad[part]
        layers = [layer for layer_name, layer in adapter.layers.items() if bool(network_of(layer_name)) is (name != "unet")]
        if layers:
            optimizer = _optimizer_of(weights, layers, replace(settings, learning_rate=rate))
            parts[name] = optimizer, rate / settings.learning_rate
    return TwoRates(parts)


def floats_per_weight(settings: OptimizerSettings) -> float:
    """Memory of the state of what `make_optimizer` returns, in fp32 numbers per weight."""
    return OPTIMIZERS[settings.optimizer].floats_per_weight + (settings.loraplus_ratio != 1) + (settings.ema_decay > 0)


class _Wrapper:
    """An optimizer that does something before and after the steps of `inner`."""

    def __init__(self, inner: Optimizer, weights: torch.nn.Parameter):
        self._inner, self._weights = inner, weights
        self.label, self.capturable = inner.label, inner.capturable
        self.param_groups: list[dict[str, Any]] = inner.param_groups

    def averaged_weights(self) -> torch.Tensor | None:
        return self._inner.averaged_weights()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._inner.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._inner.load_state_dict(state)


class TwoRates:
    """An optimizer for each part of the weights, by name and in their order, with a factor of the learning rate."""

    def __init__(self, parts: Mapping[str, tuple[Optimizer, float]]):
        self._parts = parts
        optimizers = [optimizer for optimizer, _ in parts.values()]
        self.label, self.capturable = optimizers[0].label, optimizers[0].capturable
        self.param_groups: list[dict[str, Any]] = [group for optimizer in optimizers for group in optimizer.param_groups]

    def step(self, learning_rate: torch.Tensor, found_inf: torch.Tensor | None = None) -> None:
        for optimizer, factor in self._parts.values():
            optimizer.step(learning_rate * factor, found_inf)

    def averaged_weights(self) -> torch.Tensor | None:
        averages = [optimizer.averaged_weights() for optimizer, _ in self._parts.values()]
        return None if any(average is None for average in averages) else torch.cat(averages)

    def state_dict(self) -> dict[str, torch.Tensor]:
        states = {name: optimizer.state_dict() for name, (optimizer, _) in self._parts.items()}
        return {f"{name}:{key}": value for name, state in states.items() for key, value in state.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for name, (optimizer, _) in self._parts.items():
            prefix = f"{name}:"
            optimizer.load_state_dict({key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)})


class LoraPlus(_Wrapper):
    """LoRA+ (Hayou et al. 2024, arXiv 2402.12354): the rate of `up` is `ratio` times that of `down`.

    The update of AdamW is proportional to its rate, so that of `up` [P'] is multiplied after the step.
    """

    def __init__(self, inner: Optimizer, weights: torch.nn.Parameter, ups: Sequence[torch.Tensor], ratio: float):
        super().__init__(inner, weights)
        self._ups, self._ratio = list(ups), ratio
        self._before = torch.zeros_like(weights, requires_grad=False)
        first = weights.storage_offset()
        self._ups_before = [self._before.as_strided(up.shape, up.stride(), up.storage_offset() - first) for up in ups]

    @torch.no_grad()
    def step(self, learning_rate: torch.Tensor, found_inf: torch.Tensor | None = None) -> None:
        self._before.copy_(self._weights)
        self._inner.step(learning_rate, found_inf)
        # before + ratio x (after - before), which a step that changed nothing leaves as it is
        torch._foreach_lerp_(self._ups, self._ups_before, 1 - self._ratio)


class Ema(_Wrapper):
    """Keeps an exponential moving average of the weights (Karras et al. 2023, arXiv 2312.02696, section 3). After n steps the decay
    is min(decay, (1 + n) / (10 + n)), so that the first weights are soon forgotten, as in TensorFlow's ExponentialMovingAverage."""

    def __init__(self, inner: Optimizer, weights: torch.nn.Parameter, decay: float):
        super().__init__(inner, weights)
        self._decay = decay
        steps = torch.zeros((), dtype=torch.float64, device=weights.device)
        self._state = {"ema": weights.detach().clone(), "ema_steps": steps}

    @torch.no_grad()
    def step(self, learning_rate: torch.Tensor, found_inf: torch.Tensor | None = None) -> None:
        self._inner.step(learning_rate, found_inf)
        steps = self._state["ema_steps"]
        counts = torch.ones_like(steps) if found_inf is None else (found_inf == 0).double()
        share = 1 - ((1 + steps) / (10 + steps)).clamp(max=self._decay)
        self._state["ema"].lerp_(self._weights.detach(), (counts * share).float())
        steps.add_(counts)

    def averaged_weights(self) -> torch.Tensor:
        return self._state["ema"]

    def state_dict(self) -> dict[str, torch.Tensor]:
        return super().state_dict() | self._state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        super().load_state_dict({name: value for name, value in state.items() if name not in self._state})
        for name, tensor in self._state.items():  # in place: a CUDA graph may hold their addresses
            tensor.copy_(state[name])
