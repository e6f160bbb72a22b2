"""The optimizers, and the learning rate as a pure function of the step."""

import importlib
import importlib.util
import math
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch.optim.adamw import adamw

from common.errors import SettingsError
from training.config import OptimizerSettings
from training.method.prodigy import Prodigy

Scheduler = Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "warmup_stable_decay"]
_DTYPES = {int: torch.int64, float: torch.float64}
"""Numbers of a state are kept at their full precision."""


class Optimizer(Protocol):
    """Updates the flat fp32 weights [P] of an adapter, whose `.grad` [P] is there."""

    label: str
    """The optimizer's class as the metadata of LoRA files names it."""
    capturable: bool
    """Whether `step` can be part of a CUDA graph: it never waits for the GPU."""
    param_groups: list[dict[str, Any]]
    """What torch.amp.GradScaler reads."""

    def step(self, learning_rate: torch.Tensor, found_inf: torch.Tensor | None = None) -> None:
        """Take one step. Nothing changes where `found_inf` (scalar) is not 0."""

    def averaged_weights(self) -> torch.Tensor | None:
        """[P]: what is validated, sampled and saved as a LoRA file; None: the weights themselves."""

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

    def averaged_weights(self) -> None:
        return None

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
    by_matrix = False
    """Whether it is given the matrices of the adapter, and not the flat weights."""

    def __init__(self, weights: torch.nn.Parameter | Sequence[torch.nn.Parameter], settings: OptimizerSettings):
        self._parameters = list(weights) if self.by_matrix else [weights]
        module, _, name = self.label.rpartition(".")
        optimizer_class = getattr(importlib.import_module(module), name)
        self._optimizer = optimizer_class(self._parameters, **self.options(settings))
        self.param_groups = self._optimizer.param_groups

    def options(self, settings: OptimizerSettings) -> dict[str, Any]:
        """The arguments of the class."""
        options = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay, "eps": settings.adam_epsilon}
        return options | {"betas": (settings.adam_beta1, settings.adam_beta2)}

    def step(self, learning_rate: torch.Tensor, found_inf: torch.Tensor | None = None) -> None:
        if found_inf is not None and found_inf.item():
            return
        self.param_groups[0]["lr"] = learning_rate.item()
        self._optimizer.step()

    def averaged_weights(self) -> torch.Tensor | None:
        return None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The state of the weights, or of each matrix after its number, and under `group.` the numbers that some optimizers keep
        for the whole group."""
        kept = {f"group.{name}": value for name, value in self.param_groups[0].items() if type(value) in (int, float)}
        for number, parameter in enumerate(self._parameters):
            of_parameter = self._optimizer.state[parameter].items()
            kept |= {f"{number}.{name}" if self.by_matrix else name: value for name, value in of_parameter}
        numbers = {name: torch.tensor(value, dtype=_DTYPES[type(value)]) for name, value in kept.items() if type(value) in _DTYPES}
        return kept | numbers

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for name, value in state.items():
            kept = value.item() if value.dim() == 0 else value.to(self._parameters[0].device)
            if name.startswith("group."):
                self.param_groups[0][name.removeprefix("group.")] = kept
            else:
                number, _, of_parameter = name.rpartition(".")
                self._optimizer.state[self._parameters[int(number or 0)]][of_parameter] = kept


class AdamW8bit(LibraryOptimizer):
    """AdamW with moments of 8 bits (Dettmers et al. 2021, arXiv 2110.02861)."""

    floats_per_weight = 0.52
    """Two bytes per weight, and an fp32 scale for each 256 of each moment."""
    label = "bitsandbytes.optim.AdamW8bit"
    package = "bitsandbytes"
    needs_gpu = True


class ScheduleFree(LibraryOptimizer):
    """AdamW that averages its weights instead of lowering its rate (Defazio et al. 2024, arXiv 2405.15682)."""

    floats_per_weight = 2.0
    label = "schedulefree.AdamWScheduleFree"
    package = "schedulefree"

    def __init__(self, weights: torch.nn.Parameter, settings: OptimizerSettings):
        super().__init__(weights, settings)
        self._optimizer.train()

    def averaged_weights(self) -> torch.Tensor | None:
        """x of the paper, from the weights y = (1 - beta) z + beta x. The package's `eval` and `train` would round y."""
        weights, beta = self._parameters[0].detach(), self.param_groups[0]["betas"][0]
        state = self._optimizer.state[self._parameters[0]]
        return torch.lerp(weights, state["z"], 1 - 1 / beta) if "z" in state else None


class Adafactor(LibraryOptimizer):
    """Adam without a first moment, whose second moment is a row and a column for each matrix (Shazeer & Stern 2018,
    arXiv 1804.04235). It takes the rate of the settings, because its own is proportional to the weights, of which the `up` of a
    LoRA begin at 0."""

    floats_per_weight = 0.1
    label = "transformers.Adafactor"
    package = "transformers"
    by_matrix = True

    def options(self, settings: OptimizerSettings) -> dict[str, Any]:
        fixed = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
        return {"lr": settings.learning_rate, "weight_decay": settings.weight_decay, **fixed}


OPTIMIZERS: dict[str, type[AdamW] | type[Prodigy] | type[LibraryOptimizer]] = {
    "adamw": AdamW,
    "adamw8bit": AdamW8bit,
    "prodigy": Prodigy,
    "schedulefree": ScheduleFree,
    "adafactor": Adafactor,
}
"""By their names. `floats_per_weight`: memory of the optimizer's state, in fp32 numbers per weight."""


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
    step: int,
    total_steps: int,
    peak: float,
    scheduler: Scheduler,
    warmup_steps: int,
    *,
    cycles: int = 1,
    power: float = 1.0,
    decay: float = 0.0,
) -> float:
    """The rate of optimizer step `step` (0 .. total_steps - 1): a linear rise over the first `warmup_steps` to `peak`, then
    constant, or falling to 0 after the last step: on a line, on half a cosine or `cycles` of them, as the `power` of a line, or
    on a line over the last `decay` of the steps only. The names are those of diffusers and transformers.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    length, taken = max(1, total_steps - warmup_steps), step - warmup_steps
    left = 1.0 - taken / length
    if scheduler == "linear":
        factor = left
    elif scheduler == "cosine":
        factor = 0.5 * (1.0 + math.cos(math.pi * (taken / length)))
    elif scheduler == "cosine_with_restarts":
        factor = 0.5 * (1.0 + math.cos(math.pi * (taken * cycles % length / length)))
    elif scheduler == "polynomial":
        factor = left**power
    elif scheduler == "warmup_stable_decay":
        factor = min(1.0, (total_steps - step) / max(1, math.ceil(decay * total_steps)))
    else:
        factor = 1.0
    return peak * factor
