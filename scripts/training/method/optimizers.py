"""The optimizers, and the learning rate as a pure function of the step."""

import contextlib
import importlib
import importlib.util
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, Protocol

import torch
from torch.optim.adamw import adamw

from common.errors import SettingsError
from training.config import OptimizerSettings

_DTYPES = {int: torch.int64, float: torch.float64}
"""Numbers of a state are kept at their full precision."""


class Optimizer(Protocol):
    """Updates the flat fp32 weights [P] of an adapter, whose `.grad` [P] is there."""

    floats_per_weight: float
    """Memory of the optimizer's state, in fp32 numbers per weight."""
    label: str
    """The optimizer's class as the metadata of LoRA files names it."""
    capturable: bool
    """Whether `step` can be part of a CUDA graph: it never waits for the GPU."""
    param_groups: list[dict[str, Any]]
    """What torch.amp.GradScaler reads."""

    def step(self, learning_rate: torch.Tensor, found_inf: torch.Tensor | None = None) -> None:
        """Take one step. Nothing changes where `found_inf` (scalar) is not 0."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything besides the weights that the next step depends on, by name."""

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from a `state_dict`, which may be on another device."""


class AdamW:
    """Fused AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), by torch's own function."""

    floats_per_weight = 2.0
    label = "torch.optim.AdamW"
    capturable = True

    def __init__(self, weights: torch.nn.Parameter, settings: OptimizerSettings):
        self.param_groups = [{"params": [weights]}]
        self._state = {
            "step": torch.zeros((), dtype=torch.float32, device=weights.device),
            "exp_avg": torch.zeros_like(weights, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(weights, requires_grad=False),
        }
        self._weights = weights
        self._settings = settings

    @torch.no_grad()
    def step(self, learning_rate: torch.Tensor, found_inf: torch.Tensor | None = None) -> None:
        adamw(
            [self._weights],
            [self._weights.grad],
            [self._state["exp_avg"]],
            [self._state["exp_avg_sq"]],
            [],
            [self._state["step"]],
            fused=True,
            capturable=self._weights.is_cuda,
            found_inf=found_inf,
            amsgrad=False,
            maximize=False,
            lr=learning_rate,
            beta1=self._settings.adam_beta1,
            beta2=self._settings.adam_beta2,
            eps=self._settings.adam_epsilon,
            weight_decay=self._settings.weight_decay,
        )

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self._state)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for name, tensor in self._state.items():  # in place: a CUDA graph may hold their addresses
            tensor.copy_(state[name])


class LibraryOptimizer:
    """A torch.optim.Optimizer of another package. Its steps read numbers back from the GPU, so they cannot be captured."""

    floats_per_weight: float
    label: str
    capturable = False
    package: str
    """The name under which pip installs it."""
    needs_gpu = False
    options: Mapping[str, Any] = MappingProxyType({})
    """Arguments of the class that no setting stands for."""

    def __init__(self, weights: torch.nn.Parameter, settings: OptimizerSettings):
        self._weights = weights
        module, _, name = self.label.rpartition(".")
        options = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay, "eps": settings.adam_epsilon}
        betas = settings.adam_beta1, settings.adam_beta2
        with contextlib.redirect_stdout(None):  # prodigyopt prints which kind of weight decay it uses
            optimizer_class = getattr(importlib.import_module(module), name)
            self._optimizer = optimizer_class([weights], betas=betas, **options, **self.options)
        self.param_groups = self._optimizer.param_groups

    def step(self, learning_rate: torch.Tensor, found_inf: torch.Tensor | None = None) -> None:
        if found_inf is not None and found_inf.item():
            return
        self.param_groups[0]["lr"] = learning_rate.item()
        self._optimizer.step()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The state of the weights, and under `group.` the numbers that some optimizers keep for the whole group."""
        kept = {f"group.{name}": value for name, value in self.param_groups[0].items() if type(value) in (int, float)}
        kept |= self._optimizer.state[self._weights]
        numbers = {name: torch.tensor(value, dtype=_DTYPES[type(value)]) for name, value in kept.items() if type(value) in _DTYPES}
        return kept | numbers

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        group, restored = self.param_groups[0], self._optimizer.state[self._weights]
        for name, value in state.items():
            if name.startswith("group."):
                group[name.removeprefix("group.")] = value.item()
            else:
                restored[name] = value.item() if value.dim() == 0 else value.to(self._weights.device)


class AdamW8bit(LibraryOptimizer):
    """AdamW with moments of 8 bits (Dettmers et al. 2021, arXiv 2110.02861)."""

    floats_per_weight = 0.52
    """Two bytes per weight, and an fp32 scale for each 256 of each moment."""
    label = "bitsandbytes.optim.AdamW8bit"
    package = "bitsandbytes"
    needs_gpu = True


class Prodigy(LibraryOptimizer):
    """AdamW that finds its own learning rate, of which LEARNING_RATE is a factor (Mishchenko & Defazio 2023, arXiv 2306.06101)."""

    floats_per_weight = 4.0
    label = "prodigyopt.Prodigy"
    package = "prodigyopt"
    options = MappingProxyType({"safeguard_warmup": True})  # as its authors advise where the rate is warmed up


OPTIMIZERS: dict[str, type[AdamW] | type[LibraryOptimizer]] = {"adamw": AdamW, "adamw8bit": AdamW8bit, "prodigy": Prodigy}


def require_usable(name: str, device: torch.device) -> None:
    """Raises SettingsError if the optimizer `name` cannot be used: its package is not installed, or it needs a GPU."""
    optimizer = OPTIMIZERS[name]
    if not issubclass(optimizer, LibraryOptimizer):
        return
    if importlib.util.find_spec(optimizer.package) is None:
        raise SettingsError(f"OPTIMIZER={name} needs the package {optimizer.package}: run `pip install {optimizer.package}`")
    try:
        importlib.import_module(optimizer.package)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # built for another CUDA, another machine
        reason = " ".join(str(error).split())
        raise SettingsError(f"OPTIMIZER={name}: the package {optimizer.package} cannot be loaded ({reason})") from None
    if optimizer.needs_gpu and device.type != "cuda":
        raise SettingsError(f"OPTIMIZER={name} needs an NVIDIA GPU; set OPTIMIZER=adamw")


def learning_rate_at(
    step: int, total_steps: int, peak: float, scheduler: Literal["constant", "linear", "cosine"], warmup_steps: int
) -> float:
    """The rate of optimizer step `step` (0 .. total_steps - 1): a linear rise over the first `warmup_steps` to `peak`,
    then constant, or falling to 0 after the last step on a line or half a cosine."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[scheduler]
    return peak * factor
