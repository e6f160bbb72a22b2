"""The LoRA in the UNet: PEFT injection, the weights in flat buffers, the names of the modules."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from common.errors import ModelError
from training.config import LoraSettings
from training.engine.fast.lora_linear import FusedLoraLinear
from training.models.loading import LoraConfig, LoraLinear, UNet2DConditionModel, inject_adapter_in_model, shapes_only

ADAPTER = "default"


_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


SELF_ATTENTION = "attn1.to_q,to_k,to_v"


CONTEXT = "keys and values of the text, width "


@dataclass(frozen=True)
class LoraModule:
    """One adapted linear layer: y = W x + scale * up(down(x)). Both are views of the flat fp32 weights."""

    name: str
    """Its name in the diffusers UNet."""
    down: torch.Tensor
    """[rank, in_features], fp32."""
    up: torch.Tensor
    """[out_features, rank], fp32."""


@dataclass(frozen=True)
class LoraWeights:
    """All LoRA weights of a UNet, P of them, in one flat buffer of each kind, on the UNet's device."""

    weights: torch.nn.Parameter
    """[P], fp32: what is trained, saved and exported. Its `.grad` is there always and is added to in place."""
    sums: torch.Tensor
    """[P + 1], fp32: the gradient of `weights`, and one element more, for the loss: what processes add up in one go."""
    working: torch.Tensor
    """[P] in the UNet's dtype: what the layers compute with; `weights` itself if that is fp32."""
    modules: list[LoraModule]
    """In the UNet's order."""
    stacks: dict[str, tuple[tuple[str, ...], FusedLoraLinear]]
    """FusedLoraLinear layers that are computed as one: by name, the names of their modules and the stack."""

    def refresh(self) -> None:
        """Bring `working` to the state of `weights`."""
        if self.working is not self.weights:
            self.working.copy_(self.weights.detach())


def inject(unet: UNet2DConditionModel, settings: LoraSettings, seed: int) -> LoraWeights:
    """Put a LoRA of rank and alpha of `settings` into the frozen `unet`, in place.

    The weights are fp32 whatever the UNet's dtype is. `down` starts uniform in +-1/sqrt(in_features) (Kaiming with
    a = sqrt(5), as PyTorch's Linear), from `seed` and the module's name alone; `up` starts at zero (Hu et al. 2021,
    arXiv 2106.09685, section 4.1). PEFT's layers hold views of `working`, so that the UNet can be used as PEFT made it.
    """
    names = target_modules(unet, settings.lora_targets)
    config = LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=names, lora_dropout=0.0)
    with shapes_only():  # PEFT's own way, `low_cpu_mem_usage`, changes torch for the threads that load other networks
        inject_adapter_in_model(config, unet, adapter_name=ADAPTER)
    layers = {name: module for name, module in unet.named_modules() if isinstance(module, LoraLinear)}
    if sorted(layers) != sorted(names):
        raise ModelError(f"the LoRA was put into {len(layers)} of {len(names)} linear layers; is this an SDXL UNet?")
    return _flattened(layers, settings.lora_rank, settings.lora_alpha / settings.lora_rank, seed)


def target_modules(unet: UNet2DConditionModel, targets: str) -> list[str]:
    """Names of the linear layers in the UNet's transformers: all of them, or those of "attention" only."""
    linears = [name for name, module in unet.named_modules() if isinstance(module, torch.nn.Linear) and ".attentions." in name]
    if targets == "attention":
        linears = [name for name in linears if name.endswith(_ATTENTION)]
    if not linears:
        raise ModelError("the UNet has no transformer blocks; is this an SDXL model?")
    return linears


def _flattened(layers: dict[str, LoraLinear], rank: int, scale: float, seed: int) -> LoraWeights:
    """Lay the weights of `layers` out in flat buffers, stack by stack, and let PEFT's layers see them."""
    first = next(iter(layers.values())).base_layer.weight
    sizes = [rank * (layer.in_features + layer.out_features) for layer in layers.values()]
    weights = torch.nn.Parameter(torch.zeros(sum(sizes), dtype=torch.float32, device=first.device))
    sums = torch.zeros(sum(sizes) + 1, dtype=torch.float32, device=first.device)
    weights.grad = sums[:-1]
    working = weights if first.dtype == torch.float32 else torch.zeros_like(weights, dtype=first.dtype)
    anchor = torch.zeros((), device=first.device, requires_grad=True)
    begin, modules, stacks = 0, {}, {}
    for stack, names in _stacked(layers).items():
        n, (out, width) = len(names), layers[names[0]].base_layer.weight.shape
        middle, end = begin + n * rank * width, begin + n * rank * (width + out)

        def parts(flat: torch.Tensor, begin=begin, middle=middle, end=end, n=n, width=width) -> tuple[torch.Tensor, torch.Tensor]:
            return flat[begin:middle].view(n * rank, width), flat[middle:end].view(n, -1, rank)

        down, up = parts(weights.detach())
        working_down, working_up = parts(working.detach())
        for i, name in enumerate(names):
            rows = slice(i * rank, (i + 1) * rank)
            down[rows].copy_(uniform(seed, name, (rank, width), width**-0.5))
            modules[name] = LoraModule(name, down[rows], up[i])
            layers[name].lora_A[ADAPTER].weight = torch.nn.Parameter(working_down[rows])
            layers[name].lora_B[ADAPTER].weight = torch.nn.Parameter(working_up[i])
        weight, bias = _base_of([layers[name].base_layer for name in names])
        stacks[stack] = tuple(names), FusedLoraLinear(weight, bias, working_down, working_up, *parts(weights.grad), scale, anchor)
        begin = end
    made = LoraWeights(weights, sums, working, [modules[name] for name in layers], stacks)
    with torch.no_grad():
        made.refresh()
    return made


def _stacked(layers: dict[str, LoraLinear]) -> dict[str, list[str]]:
    """Which layers read the same input and can be one product."""
    stacks: dict[str, list[str]] = {}
    for name, layer in layers.items():
        if re.search(r"\.attn1\.to_[qkv]$", name):
            stack = f"{name.rpartition('.attn1.')[0]}.{SELF_ATTENTION}"
        elif re.search(r"\.attn2\.to_[kv]$", name):
            stack = f"{CONTEXT}{layer.out_features}"
        else:
            stack = name
        stacks.setdefault(stack, []).append(name)
    return stacks


def _base_of(linears: Sequence[torch.nn.Linear]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The frozen weights of `linears` below each other; the layers become views of them, so that nothing lies twice."""
    if len(linears) == 1:
        return linears[0].weight.detach(), linears[0].bias
    weight = torch.cat([linear.weight.detach() for linear in linears])
    for linear, rows in zip(linears, weight.split(linears[0].out_features), strict=True):
        linear.weight = torch.nn.Parameter(rows, requires_grad=False)
    return weight, None if linears[0].bias is None else torch.cat([linear.bias.detach() for linear in linears])


def uniform(seed: int, name: str, shape: tuple[int, ...], bound: float) -> torch.Tensor:
    """fp32 tensor of `shape`, uniform in -bound .. bound, determined by `seed` and `name` alone."""
    counter = np.frombuffer(hashlib.sha256(name.encode()).digest(), dtype="<u8")
    generator = np.random.Generator(np.random.Philox(key=seed, counter=counter))
    return torch.from_numpy(generator.random(shape, dtype=np.float32) * (2 * bound) - bound)
