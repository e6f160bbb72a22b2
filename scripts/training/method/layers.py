"""Which layers of the networks are adapted and with which rank, and what a LoRA file calls them."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft.tuners.lokr.layer import factorization

from common.errors import ModelError, SettingsError
from training.config import LoraSettings
from training.models.sdxl import TEXT_ENCODERS, BaseModel
from training.models.weights import networks_without_weights

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
_CONVOLUTION = re.compile(r"\.resnets\.\d\.conv[12]|\.(down|up)samplers\.0\.conv")
_BLOCK = re.compile(r"(down|up)_blocks\.(\d)\.(attentions\.([0-2])|resnets\.([0-2])|(?:down|up)samplers\.0)\.(.+)")
"""A fourth attention module would get the name of the first one of the next block."""
_MID_BLOCK = re.compile(r"mid_block\.(attentions\.0|resnets\.([01]))\.(.+)")
_RESNET = {"conv1": "in_layers_2", "conv2": "out_layers_3"}
_TEXT_LAYER = re.compile(r"text_encoder(_2)?\.(text_model\.encoder\.layers\.\d+\.(?:self_attn\.(?:[qkv]|out)_proj|mlp\.fc[12]))")


@dataclass(frozen=True)
class LayerRank:
    """How one layer is adapted."""

    rank: int
    alpha: float


def named_layers(
    unet: UNet2DConditionModel, text_encoders: Sequence[torch.nn.Module] = ()
) -> Iterator[tuple[str, torch.nn.Module]]:
    """Every module of the networks with its name, in their order. Those of text encoders have
    diffusers' names, whatever the version of transformers: `text_encoder.text_model.encoder.layers.0.self_attn.q_proj`."""
    yield from unet.named_modules()
    for prefix, encoder in zip(TEXT_ENCODERS, text_encoders, strict=False):
        for name, module in encoder.named_modules():
            yield f"{prefix}.text_model.{name.removeprefix('text_model.')}", module


def network_of(layer: str) -> str:
    """Which of TEXT_ENCODERS has the layer; empty for the UNet."""
    first = layer.partition(".")[0]
    return first if first in TEXT_ENCODERS else ""


def weight_shapes(unet: UNet2DConditionModel, text_encoders: Sequence[torch.nn.Module] = ()) -> dict[str, tuple[int, ...]]:
    """The shape of the weight of every linear layer and convolution, by name, in the networks' order."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {name: tuple(module.weight.shape) for name, module in named_layers(unet, text_encoders) if isinstance(module, kinds)}


def shapes_of_base(base: BaseModel, settings: LoraSettings) -> dict[str, tuple[int, ...]]:
    """`weight_shapes` of the networks of `base` of which `settings` adapt layers."""
    unet, *text_encoders = networks_without_weights(base, text_encoders=settings.train_text_encoders)
    return weight_shapes(unet, text_encoders)


def adapted_layers(shapes: Mapping[str, tuple[int, ...]], settings: LoraSettings) -> dict[str, LayerRank]:
    """The layers that `settings` select of those with these weights, in the same order.

    These are the linear layers of the transformers (all of them, or those of "attention" only), those of text encoders as well if
    there are any, and the 3x3 convolutions of ResNets and samplers if they have a rank. Of `lora_rank_pattern`, the first
    expression that is found in a layer's name decides, in diffusers' or in kohya's spelling. Raises ModelError if this is not an
    SDXL UNet, SettingsError for an expression that decides nothing.
    """
    linears = [name for name, shape in shapes.items() if ".attentions." in name and len(shape) == 2]
    if not linears:
        raise ModelError("the UNet has no transformer blocks; is this an SDXL model?")
    linears += filter(_TEXT_LAYER.fullmatch, shapes)
    if settings.lora_targets == "attention":
        linears = [name for name in linears if name.endswith(_ATTENTION)]
    ranks = dict.fromkeys(linears, settings.lora_rank)
    if settings.lora_conv_rank:
        ranks |= {name: settings.lora_conv_rank for name in shapes if _CONVOLUTION.search(name)}
    rules, found, used, layers = settings.rank_rules, set(), set(), {}
    for name in (name for name in shapes if name in ranks):
        spellings = (name, kohya_name(name)) if rules else ()
        matches = [rule for rule in rules if any(rule[0].search(spelling) for spelling in spellings)]
        found.update(id(rule) for rule in matches)
        used.update(id(rule) for rule in matches[:1])
        _, rank, alpha = matches[0] if matches else (None, ranks[name], None)
        usual = float(rank) if settings.lora_alpha == "auto" else settings.lora_alpha
        if rank:
            layers[name] = LayerRank(rank, usual if alpha is None else alpha)
    if hidden := [rule[0].pattern for rule in rules if id(rule) in found - used]:
        raise SettingsError(
            f"LORA_RANK_PATTERN: {', '.join(map(repr, hidden))} decides nothing, because each of its layers matches an expression "
            "before it; put the special one first"
        )
    if unused := [rule[0].pattern for rule in rules if id(rule) not in found]:
        what = "; convolutions have a rank with LORA_CONV_RANK only" if not settings.lora_conv_rank else ""
        if any("te1" in each or "te2" in each or "text" in each for each in unused) and not settings.train_text_encoders:
            what = "; text encoders are adapted with TRAIN_TEXT_ENCODERS=true only"
        raise SettingsError(f"LORA_RANK_PATTERN: no adapted layer's name contains {', '.join(map(repr, unused))}{what}")
    if not layers:
        raise SettingsError("LORA_RANK_PATTERN leaves out every layer: give one of them a rank")
    if settings.train_text_encoders and not any(map(_TEXT_LAYER.fullmatch, layers)):
        what = "leaves out every layer of the text encoders"
        raise SettingsError(f"LORA_RANK_PATTERN {what}: give one of them a rank, or set TRAIN_TEXT_ENCODERS=false")
    return layers


def factor_shapes(shape: tuple[int, ...], rank: int, settings: LoraSettings) -> dict[str, tuple[int, ...]]:
    """The shapes of the trained factors of a layer whose weight has this `shape`, by the keys of a LoRA file; kernels flattened."""
    out, inputs, kernel = shape[0], shape[1], math.prod(shape[2:])
    if settings.lora_type == "lokr":
        (out_l, out_k), (in_m, in_n) = (factorization(size, lokr_factor(settings)) for size in (out, inputs))
        small = {"lokr_w1": (out_l, in_m)}
        if 2 * rank >= max(out_k, in_n):
            return small | {"lokr_w2": (out_k, in_n * kernel)}
        return small | {"lokr_w2_a": (out_k, rank), "lokr_w2_b": (rank, in_n * kernel)}
    down, up = (rank, inputs * kernel), (out, rank)
    if settings.lora_type == "loha":
        return {"hada_w1_a": up, "hada_w1_b": down, "hada_w2_a": up, "hada_w2_b": down}
    return {"lora_down.weight": down, "lora_up.weight": up}


def count_weights(shape: tuple[int, ...], rank: int, settings: LoraSettings) -> int:
    """How many weights are trained for a layer whose weight has this `shape`."""
    magnitudes = shape[0] if settings.lora_type == "dora" else 0
    return magnitudes + sum(map(math.prod, factor_shapes(shape, rank, settings).values()))


def lokr_factor(settings: LoraSettings) -> int:
    """`lokr_factor` as PEFT takes it."""
    return -1 if settings.lokr_factor == "auto" else settings.lokr_factor


def kohya_name(layer: str) -> str:
    """The kohya name of a layer, with the original (sgm) block numbers of the UNet. Raises ModelError if it is not a layer that can
    be adapted."""
    if match := _TEXT_LAYER.fullmatch(layer):
        return f"lora_te{2 if match[1] else 1}_{match[2].replace('.', '_')}"
    original = None
    if match := _MID_BLOCK.fullmatch(layer):
        original = f"middle_block_1_{match[3]}" if match[2] is None else _resnet(f"middle_block_{2 * int(match[2])}", match[3])
    elif match := _BLOCK.fullmatch(layer):
        original = _in_block(match[1] == "down", int(match[2]), match[4], match[5], match[6])
    if original is None:
        raise ModelError(f"{layer} is not a layer of SDXL's attention modules, ResNets and samplers; ComfyUI would ignore it")
    return f"lora_unet_{original.replace('.', '_')}"


def _in_block(is_down: bool, level: int, attention: str | None, resnet: str | None, rest: str) -> str | None:
    """The original name of layer `rest` of an attention module, a ResNet or else a sampler; None if there is none.

    Input blocks are numbered from 1, three a level: two ResNets with their attention, then the sampler. Output blocks have three
    ResNets a level, and the sampler is in the last one, behind the attention if there is one.
    """
    first = 3 * level + 1 if is_down else 3 * level
    side = "input_blocks" if is_down else "output_blocks"
    if attention is not None:
        return f"{side}_{first + int(attention)}_1_{rest}"
    if resnet is not None:
        return _resnet(f"{side}_{first + int(resnet)}_0", rest)
    if rest != "conv":
        return None
    return f"{side}_{first + 2}_0_op" if is_down else f"{side}_{first + 2}_2_conv"


def _resnet(block: str, layer: str) -> str | None:
    return f"{block}_{_RESNET[layer]}" if layer in _RESNET else None
