"""Put trainable layers of low rank into frozen networks: ordinary PEFT modules whose parameters are views of one flat buffer."""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

from common.errors import ModelError
from training.config import LoraSettings
from training.method.dora import dora_forward
from training.method.layers import LayerRank, adapted_layers, lokr_factor, named_layers, network_of, weight_shapes
from training.models.int8 import Int8Conv2d
from training.models.sdxl import TEXT_ENCODERS
from training.models.weights import shapes_only

ADAPTER = "default"
"""PEFT's name of the only adapter."""
SELF_ATTENTION = "attn1.to_q,to_k,to_v"
CONTEXT = "keys and values of the text, width "
KEPT_BYTES_PER_WEIGHT = {"lora": 0, "dora": 0, "loha": 2, "lokr": 2}
"""Memory that an adapter keeps for the backward, per frozen weight of the adapted layers: LoHa and LoKr keep their change in the
UNet's dtype. With gradient checkpointing only one block has it at a time."""
_LORA = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight"}
_FACTORS = {
    "lora": _LORA,
    "dora": _LORA,
    "loha": {name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
    "lokr": {name: name for name in ("lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b")},
}
"""Attributes of PEFT's layers and the keys of a LoRA file for them, by kind. A LoKr layer has `lokr_w2` or its two factors."""
_ZERO = ("lora_up.weight", "hada_w2_a", "lokr_w2", "lokr_w2_b")
"""The factors that start at zero, one in each layer: the change of a layer is proportional to it."""
_NORMAL = {"hada_w1_a": 0.1, "hada_w1_b": 1.0, "hada_w2_b": 1.0}
"""Standard deviations of the factors that start normally distributed, as in LyCORIS. The others start uniform."""


@dataclass(frozen=True)
class LoraModule:
    """One adapted layer. LoRA: W + scale up @ down; DoRA scales each row of that to `magnitude`; LoHa: W + scale (w1_a @ w1_b) *
    (w2_a @ w2_b); LoKr: W + scale kron(w1, w2), with w2 as it is or w2_a @ w2_b. Convolutions have flattened weights.

    All parameters are fp32 and are PEFT's own: a LoRA file is written from them.
    """

    name: str
    """Name of the layer in diffusers' networks."""
    factors: Mapping[str, torch.Tensor]
    """By the keys of a LoRA file."""
    scale: float
    """What the product of the factors is multiplied by."""
    rank: int
    magnitude: torch.Tensor | None = None
    """One number per output: DoRA's row norms (PEFT's `lora_magnitude_vector`); None for other kinds."""
    base: torch.Tensor | None = None
    """The frozen weight, which the export of DoRA needs; None for other kinds."""

    @property
    def alpha(self) -> float:
        """A LoRA file's."""
        return self.scale * self.rank

    @property
    def zero(self) -> torch.Tensor:
        """The factor that the layer's change is proportional to, and that starts at zero."""
        return next(self.factors[key] for key in _ZERO if key in self.factors)


@dataclass(frozen=True)
class Adapter:
    """Everything that is trained, P weights in all, on the UNet's device."""

    weights: torch.nn.Parameter
    """[P], fp32: the parameters of all PEFT layers one after the other, which optimizer and checkpoints see as one tensor. Its
    `.grad` always exists and is accumulated in place."""
    sums: torch.Tensor
    """[P + 1], fp32: the gradient of `weights` and one element for the loss, so that processes add up both in one all_reduce."""
    modules: list[LoraModule]
    """In the networks' order."""
    layers: dict[str, BaseTunerLayer]
    """The PEFT layers by name, in the order in which their parameters are in `weights`."""
    unet_weights: int
    """How many of the weights are the UNet's; those of text encoders, if they are trained, follow."""
    dropout: float = 0.0
    """Share of the inputs that layers leave out while `dropping` is entered."""

    @contextmanager
    def dropping(self) -> Iterator[None]:
        """Within this block layers leave out inputs by `dropout`, drawn from torch's global generators."""
        for layer in self.layers.values() if self.dropout else ():
            layer.train()
        try:
            yield
        finally:
            for layer in self.layers.values() if self.dropout else ():
                layer.eval()


def inject(unet: UNet2DConditionModel, settings: LoraSettings, seed: int, text_encoders: Sequence[torch.nn.Module] = ()) -> Adapter:
    """Adapt the layers of the frozen networks that `settings` select, in place.

    The weights are fp32 whatever the networks' dtype is. They start from `seed` and the layer's name alone, and change nothing: one
    factor starts at zero (Hu et al. 2021, arXiv 2106.09685, section 4.1), the others as PyTorch's layers do or, for LoHa, as
    LyCORIS does; DoRA's magnitude at the norms of W's rows (Liu et al. 2024, arXiv 2402.09353, section 4.1).
    """
    ranks = adapted_layers(weight_shapes(unet, text_encoders), settings)
    # PEFT fills the layers with values that are replaced below. Without memory behind them that takes no time, but DoRA
    # measures the weights, which PEFT cannot do with one of them on the meta device.
    for prefix, network in zip(("", *TEXT_ENCODERS), (unet, *text_encoders), strict=False):
        chosen = {name: rank for name, rank in ranks.items() if network_of(name) == prefix}
        with nullcontext() if settings.lora_type == "dora" else shapes_only():
            if chosen:
                inject_adapter_in_model(_peft_config(settings, chosen), network, adapter_name=ADAPTER)
    layers = {name: module for name, module in named_layers(unet, text_encoders) if isinstance(module, BaseTunerLayer)}
    if sorted(layers) != sorted(ranks):
        raise ModelError(f"only {len(layers)} of {len(ranks)} layers could be adapted; is this an SDXL UNet?")
    for name, layer in layers.items():
        layer.eval()  # random choices of its own are for training alone
        # As in LyCORIS and ComfyUI, a Kronecker product of two whole matrices has no scale.
        is_whole = ADAPTER in getattr(layer, "lokr_w2", ())
        layer.scaling[ADAPTER] = 1.0 if is_whole else settings.scale(ranks[name].rank, ranks[name].alpha)
        if settings.lora_type == "lora" and isinstance(layer.get_base_layer(), Int8Conv2d):
            # PEFT makes both factors of the frozen layer's class, which computes no gradient of its weight.
            layer.lora_A[ADAPTER].__class__ = layer.lora_B[ADAPTER].__class__ = torch.nn.Conv2d
        if settings.lora_type == "dora":
            squares = row_norms(layer.get_base_layer().weight) ** 2
            layer.lora_variant[ADAPTER].forward = partial(dora_forward, squares=squares)
        if settings.lora_type in ("loha", "lokr"):
            layer.get_delta_weight = partial(_in_dtype, layer.get_base_layer().weight.dtype, layer.get_delta_weight)
    return _with_flat_parameters(layers, settings, seed)


def _peft_config(settings: LoraSettings, ranks: Mapping[str, LayerRank]) -> PeftConfig:
    """PEFT's configuration for the layers `ranks` of one network. PEFT compares the ends of names."""
    ranks = {name.rpartition("text_model.")[2]: rank for name, rank in ranks.items()}
    names = {rank: [name for name, layer in ranks.items() if layer.rank == rank] for rank in {each.rank for each in ranks.values()}}
    patterns = {"|".join(map(re.escape, group)): rank for rank, group in names.items()} if len(names) > 1 else {}
    shared = {"r": next(iter(names)), "target_modules": list(ranks), "rank_pattern": patterns}
    if settings.lora_type == "loha":
        return LoHaConfig(**shared)
    if settings.lora_type == "lokr":
        return LoKrConfig(**shared, decompose_factor=lokr_factor(settings))
    return LoraConfig(**shared, lora_dropout=settings.lora_dropout, use_dora=settings.lora_type == "dora")


def _in_dtype(dtype: torch.dtype, change: Callable[..., torch.Tensor], *arguments: object, **options: object) -> torch.Tensor:
    """The `change` of a layer that multiplies with all of it, which is computed in fp32, in the dtype of the UNet's products."""
    return change(*arguments, **options).to(dtype)


def shared_input_groups(layers: Iterable[tuple[str, BaseTunerLayer]]) -> dict[str, list[str]]:
    """Names of the layers that can be computed together, by a name of the group: queries, keys and values of a self-attention, and
    all keys and values of the text that have the same width; both if they have the same rank and scale. Every other layer is a
    group of its own."""
    layers = dict(layers)
    kinds = {name: (layer.r[ADAPTER], layer.scaling[ADAPTER]) for name, layer in layers.items()}
    groups: dict[str, list[str]] = {}
    for name, layer in layers.items():
        group = name
        if match := re.search(r"\.attn1\.to_[qkv]$", name):
            block = name[: match.start()]
            siblings = {kinds[each] for each in (f"{block}.attn1.to_{part}" for part in "qkv") if each in kinds}
            group = f"{block}.{SELF_ATTENTION}" if len(siblings) == 1 else name
        elif re.search(r"\.attn2\.to_[kv]$", name):
            group = f"{CONTEXT}{layer.out_features}, rank and scale {kinds[name]}"
        groups.setdefault(group, []).append(name)
    return groups


def _with_flat_parameters(layers: dict[str, BaseTunerLayer], settings: LoraSettings, seed: int) -> Adapter:
    """Make the parameters of `layers` views of one flat buffer.

    The order is part of the checkpoint format: group by group, the first factor of all layers of a group before the second one, so
    that a group can be computed as one product; then all magnitudes. The UNet's come first, then those of the text encoders.
    """
    factors = _FACTORS[settings.lora_type]
    groups = shared_input_groups(layers.items())
    ordered = {name: layers[name] for names in groups.values() for name in names}
    present = {name: [each for each in factors if ADAPTER in getattr(layer, each)] for name, layer in layers.items()}
    order = [(name, each) for names in groups.values() for each in factors for name in names if each in present[name]]
    if settings.lora_type == "dora":
        order += [(name, "lora_magnitude_vector") for name in ordered]
    order.sort(key=lambda key: network_of(key[0]) != "")  # a stable sort
    shapes = {key: _parameter(layers[key[0]], key[1]).shape for key in order}
    count = sum(math.prod(shape) for shape in shapes.values())
    of_unet = sum(math.prod(shape) for (name, _), shape in shapes.items() if not network_of(name))
    device = next(iter(layers.values())).get_base_layer().weight.device
    weights = torch.nn.Parameter(torch.zeros(count, dtype=torch.float32, device=device))
    sums = torch.zeros(count + 1, dtype=torch.float32, device=device)
    weights.grad = sums[:-1]
    taken, parameters = 0, {name: {} for name in layers}
    for (name, attribute), shape in shapes.items():
        part = slice(taken, taken + math.prod(shape))
        view = torch.nn.Parameter(weights.detach()[part].view(shape))
        view.grad = sums[part].view(shape)  # autograd adds to the flat gradient, in place
        _replace_parameter(layers[name], attribute, view)
        parameters[name][attribute] = view.detach()
        taken = part.stop
    modules = []
    for name, layer in layers.items():
        magnitude = parameters[name].pop("lora_magnitude_vector", None)
        named = {factors[attribute]: weight for attribute, weight in parameters[name].items()}
        base = None if magnitude is None else layer.get_base_layer().weight
        modules.append(LoraModule(name, named, layer.scaling[ADAPTER], layer.r[ADAPTER], magnitude, base))
        _initialise(modules[-1], seed)
    return Adapter(weights, sums, modules, ordered, of_unet, settings.lora_dropout)


def _parameter(layer: BaseTunerLayer, attribute: str) -> torch.Tensor:
    """PEFT keeps the parameters of an adapter in layers of their own, or as they are."""
    held = getattr(layer, attribute)[ADAPTER]
    return held.weight if isinstance(held, torch.nn.Module) else held


def _replace_parameter(layer: BaseTunerLayer, attribute: str, parameter: torch.nn.Parameter) -> None:
    held = getattr(layer, attribute)
    if isinstance(held, torch.nn.ParameterDict):
        held[ADAPTER] = parameter
    else:
        held[ADAPTER].weight = parameter


@torch.no_grad()
def _initialise(module: LoraModule, seed: int) -> None:
    """Give the weights of `module`, which are zero, their first values."""
    for key, weight in module.factors.items():
        if key in _NORMAL:
            normal = _generator(seed, f"{module.name}.{key}").standard_normal(tuple(weight.shape), dtype=np.float32)
            weight.copy_(_NORMAL[key] * torch.from_numpy(normal))
        elif key not in _ZERO:
            # Kaiming's with a = sqrt(5), as PyTorch's layers; a LoRA's name is that of its layer alone.
            bound = (weight[0].numel()) ** -0.5
            name = module.name if key == "lora_down.weight" else f"{module.name}.{key}"
            weight.copy_(_uniform(seed, name, tuple(weight.shape), bound))
    if module.magnitude is not None:
        module.magnitude.copy_(row_norms(module.base).view_as(module.magnitude))


@contextmanager
def at_strength(adapter: Adapter, strength: float) -> Iterator[None]:
    """Within this block the adapter changes the layers `strength` times as much; 0 is the base model. Its weights are restored to
    the last bit. For DoRA, the magnitudes are interpolated with the norms of the frozen weights."""
    if strength == 1:
        yield
        return
    with torch.no_grad():
        trained = adapter.weights.clone()
        for module in adapter.modules:
            module.zero.mul_(strength)
            if module.magnitude is not None:
                norms = row_norms(module.base).view_as(module.magnitude)
                module.magnitude.copy_(torch.lerp(norms, module.magnitude, strength))
    try:
        yield
    finally:
        with torch.no_grad():
            adapter.weights.copy_(trained)


def row_norms(weight: torch.Tensor) -> torch.Tensor:
    """[out]: the Euclidean norm of each row of `weight` [out, ...], fp32."""
    return torch.linalg.vector_norm(weight.float().flatten(1), dim=1)


def _generator(seed: int, name: str) -> np.random.Generator:
    """Determined by `seed` and `name` alone."""
    counter = np.frombuffer(hashlib.sha256(name.encode()).digest(), dtype="<u8")
    return np.random.Generator(np.random.Philox(key=seed, counter=counter))


def _uniform(seed: int, name: str, shape: tuple[int, ...], bound: float) -> torch.Tensor:
    """fp32 tensor of `shape`, uniform in -bound .. bound, determined by `seed` and `name` alone."""
    return torch.from_numpy(_generator(seed, name).random(shape, dtype=np.float32) * (2 * bound) - bound)
