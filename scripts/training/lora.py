"""The LoRA in the UNet: PEFT injection, the trainable parameters, the names of the modules."""

from dataclasses import dataclass

import peft
import torch
from diffusers import UNet2DConditionModel
from peft.tuners.lora import Linear as LoraLinear

from errors import ModelError
from training.config import LoraSettings
from training.draws import uniform

ADAPTER = "default"
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class LoraModule:
    """One adapted linear layer: y = W x + scale * up(down(x))."""

    name: str
    """Its name in the diffusers UNet."""
    down: torch.nn.Parameter
    """[rank, in_features], fp32."""
    up: torch.nn.Parameter
    """[out_features, rank], fp32."""


def inject(unet: UNet2DConditionModel, settings: LoraSettings, seed: int) -> list[LoraModule]:
    """Put a LoRA of rank and alpha of `settings` into the frozen `unet`, in place; return its modules in the UNet's order.

    The weights are fp32 whatever the UNet's dtype is. `down` starts uniform in +-1/sqrt(in_features) (Kaiming with
    a = sqrt(5), as PyTorch's Linear), from `seed` and the module's name alone; `up` starts at zero (Hu et al. 2021,
    arXiv 2106.09685, section 4.1).
    """
    names = target_modules(unet, settings.lora_targets)
    config = peft.LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=names, lora_dropout=0.0)
    peft.inject_adapter_in_model(config, unet, adapter_name=ADAPTER)
    layers = {name: module for name, module in unet.named_modules() if isinstance(module, LoraLinear)}
    if sorted(layers) != sorted(names):
        raise ModelError(f"the LoRA was put into {len(layers)} of {len(names)} linear layers; is this an SDXL UNet?")
    modules = []
    for name, layer in layers.items():
        down, up = layer.lora_A[ADAPTER].float().weight, layer.lora_B[ADAPTER].float().weight
        with torch.no_grad():
            down.copy_(uniform(seed, name, tuple(down.shape), down.shape[1] ** -0.5))
            up.zero_()
        modules.append(LoraModule(name, down.requires_grad_(True), up.requires_grad_(True)))
    return modules


def target_modules(unet: UNet2DConditionModel, targets: str) -> list[str]:
    """Names of the linear layers in the UNet's transformers: all of them, or those of "attention" only."""
    linears = [name for name, module in unet.named_modules() if isinstance(module, torch.nn.Linear) and ".attentions." in name]
    if targets == "attention":
        linears = [name for name in linears if name.endswith(_ATTENTION)]
    if not linears:
        raise ModelError("the UNet has no transformer blocks; is this an SDXL model?")
    return linears


def trainable_parameters(modules: list[LoraModule]) -> list[torch.nn.Parameter]:
    """All LoRA weights in a fixed order: down, up, module by module."""
    return [weight for module in modules for weight in (module.down, module.up)]
