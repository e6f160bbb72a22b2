"""Put trainable low-rank layers into the frozen UNet: ordinary PEFT modules whose parameters are views of one flat buffer."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear

from common.errors import ModelError
from training.config import LoraSettings
from training.models.weights import shapes_only

ADAPTER = "default"
"""PEFT's name of the only adapter."""
SELF_ATTENTION = "attn1.to_q,to_k,to_v"
CONTEXT = "keys and values of the text, width "
KEPT_BYTES_PER_WEIGHT = {"lora": 0, "dora": 5}
"""Memory that an adapter keeps for the backward, per frozen weight of the adapted layers. For DoRA, PEFT keeps the sum of frozen
weight and adapter: a step of batch 1 reserved 26.6 GiB on an H100. With gradient checkpointing only one block has it at a time."""
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class LoraModule:
    """One adapted linear layer. LoRA: y = W x + scale * up(down(x)); DoRA scales each row of W + scale * up @ down to `magnitude`.

    All parameters are fp32 and are PEFT's own: a LoRA file is written from them.
    """

    name: str
    """Name of the layer in the diffusers UNet."""
    down: torch.Tensor
    """[rank, in_features], PEFT's `lora_A`."""
    up: torch.Tensor
    """[out_features, rank], PEFT's `lora_B`."""
    magnitude: torch.Tensor | None = None
    """[out_features], DoRA's row norms (PEFT's `lora_magnitude_vector`); None for a LoRA."""
    base: torch.Tensor | None = None
    """[out_features, in_features], the frozen weight, which the export of DoRA needs; None for a LoRA."""


@dataclass(frozen=True)
class Adapter:
    """Everything that is trained, P weights in all, on the UNet's device."""

    scale: float
    """alpha / rank"""
    weights: torch.nn.Parameter
    """[P], fp32: the parameters of all PEFT layers one after the other, which optimizer and checkpoints see as one tensor. Its
    `.grad` always exists and is accumulated in place."""
    sums: torch.Tensor
    """[P + 1], fp32: the gradient of `weights` and one element for the loss, so that processes add up both in one all_reduce."""
    modules: list[LoraModule]
    """In the UNet's order."""
    layers: dict[str, LoraLinear]
    """The PEFT layers by name, in the order in which their parameters are in `weights`."""


def inject(unet: UNet2DConditionModel, settings: LoraSettings, seed: int) -> Adapter:
    """Adapt the linear layers of the frozen `unet` that `settings` select, in place.

    The weights are fp32 whatever the UNet's dtype is. `down` starts uniform in +-1/sqrt(in_features) (Kaiming with
    a = sqrt(5), as PyTorch's Linear), from `seed` and the layer's name alone; `up` starts at zero (Hu et al. 2021,
    arXiv 2106.09685, section 4.1), and DoRA's magnitude at the norms of W's rows (Liu et al. 2024, arXiv 2402.09353, section 4.1).
    """
    names = target_modules(unet, settings.lora_targets)
    config = LoraConfig(
        r=settings.lora_rank, lora_alpha=settings.alpha, target_modules=names, lora_dropout=0.0,
        use_dora=settings.lora_type == "dora",
    )  # fmt: skip
    # PEFT fills the layers with values that are replaced below. Without memory behind them that takes no time, but DoRA
    # measures the weights, which PEFT cannot do with one of them on the meta device.
    with shapes_only() if settings.lora_type == "lora" else nullcontext():
        inject_adapter_in_model(config, unet, adapter_name=ADAPTER)
    layers = {name: module for name, module in unet.named_modules() if isinstance(module, LoraLinear)}
    if sorted(layers) != sorted(names):
        raise ModelError(f"only {len(layers)} of {len(names)} linear layers could be adapted; is this an SDXL UNet?")
    return _with_flat_parameters(layers, settings, seed)


def target_modules(unet: UNet2DConditionModel, targets: str) -> list[str]:
    """Names of the linear layers in the UNet's transformers: all of them, or those of "attention" only."""
    linears = [name for name, module in unet.named_modules() if isinstance(module, torch.nn.Linear) and ".attentions." in name]
    if targets == "attention":
        linears = [name for name in linears if name.endswith(_ATTENTION)]
    if not linears:
        raise ModelError("the UNet has no transformer blocks; is this an SDXL model?")
    return linears


def shared_input_groups(layers: Iterable[tuple[str, LoraLinear]]) -> dict[str, list[str]]:
    """Names of the layers that read the same input, by a name of the group: queries, keys and values of a self-attention, and
    all keys and values of the text that have the same width. Every other layer is a group of its own."""
    groups: dict[str, list[str]] = {}
    for name, layer in layers:
        if re.search(r"\.attn1\.to_[qkv]$", name):
            group = f"{name.rpartition('.attn1.')[0]}.{SELF_ATTENTION}"
        elif re.search(r"\.attn2\.to_[kv]$", name):
            group = f"{CONTEXT}{layer.out_features}"
        else:
            group = name
        groups.setdefault(group, []).append(name)
    return groups


def _with_flat_parameters(layers: dict[str, LoraLinear], settings: LoraSettings, seed: int) -> Adapter:
    """Make the parameters of `layers` views of one flat buffer.

    The order is part of the checkpoint format: group by group, all `down` of a group before all `up`, so that a group can be
    computed as one product; then all magnitudes.
    """
    groups = shared_input_groups(layers.items())
    ordered = {name: layers[name] for names in groups.values() for name in names}
    count = sum(settings.lora_rank * (layer.in_features + layer.out_features) for layer in ordered.values())
    if settings.lora_type == "dora":
        count += sum(layer.out_features for layer in ordered.values())
    device = next(iter(layers.values())).base_layer.weight.device
    weights = torch.nn.Parameter(torch.zeros(count, dtype=torch.float32, device=device))
    sums = torch.zeros(count + 1, dtype=torch.float32, device=device)
    weights.grad = sums[:-1]
    taken = 0

    def parameter(*shape: int) -> torch.nn.Parameter:
        """The next weights as a parameter of that shape; autograd adds its gradient to the flat one in place."""
        nonlocal taken
        part = slice(taken, taken + int(np.prod(shape)))
        taken = part.stop
        view = torch.nn.Parameter(weights.detach()[part].view(shape))
        view.grad = sums[part].view(shape)
        return view

    for names in groups.values():
        for name in names:
            layers[name].lora_A[ADAPTER].weight = parameter(settings.lora_rank, layers[name].in_features)
        for name in names:
            layers[name].lora_B[ADAPTER].weight = parameter(layers[name].out_features, settings.lora_rank)
    with torch.no_grad():
        for name, layer in ordered.items():
            down = layer.lora_A[ADAPTER].weight
            down.copy_(_uniform(seed, name, tuple(down.shape), layer.in_features**-0.5))
        if settings.lora_type == "dora":
            for layer in ordered.values():
                layer.lora_magnitude_vector[ADAPTER].weight = parameter(layer.out_features)
                layer.lora_magnitude_vector[ADAPTER].weight.copy_(row_norms(layer.base_layer.weight))
    modules = [_lora_module(name, layer, settings.lora_type) for name, layer in layers.items()]
    return Adapter(settings.alpha / settings.lora_rank, weights, sums, modules, ordered)


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
            module.up.mul_(strength)
            if module.magnitude is not None:
                module.magnitude.copy_(torch.lerp(row_norms(module.base), module.magnitude, strength))
    try:
        yield
    finally:
        with torch.no_grad():
            adapter.weights.copy_(trained)


def _lora_module(name: str, layer: LoraLinear, kind: str) -> LoraModule:
    down, up = layer.lora_A[ADAPTER].weight.detach(), layer.lora_B[ADAPTER].weight.detach()
    if kind == "lora":
        return LoraModule(name, down, up)
    return LoraModule(name, down, up, layer.lora_magnitude_vector[ADAPTER].weight.detach(), layer.base_layer.weight)


def row_norms(weight: torch.Tensor) -> torch.Tensor:
    """[out]: the Euclidean norm of each row of `weight` [out, in], fp32."""
    return torch.linalg.vector_norm(weight.float(), dim=1)


def _uniform(seed: int, name: str, shape: tuple[int, ...], bound: float) -> torch.Tensor:
    """fp32 tensor of `shape`, uniform in -bound .. bound, determined by `seed` and `name` alone."""
    counter = np.frombuffer(hashlib.sha256(name.encode()).digest(), dtype="<u8")
    generator = np.random.Generator(np.random.Philox(key=seed, counter=counter))
    return torch.from_numpy(generator.random(shape, dtype=np.float32) * (2 * bound) - bound)
