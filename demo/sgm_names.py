"""SDXL's original (sgm) layout: where it holds each weight that diffusers and transformers name.

The opposite direction of diffusers' conversions, with which training reads such a file; the two check each other.
"""

import re
from dataclasses import dataclass

from training.models.sdxl import PREFIXES


@dataclass(frozen=True)
class Source:
    """Where a weight is in the file."""

    key: str
    third: int | None = None
    """Query, key and value are one tensor: which third of its rows this is."""
    transposed: bool = False


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}

_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}

_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}

_OPEN_CLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}

_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}

_QKV = ("q_proj", "k_proj", "v_proj")


def sgm_source(component: str, name: str) -> Source:
    """Where the file holds the weight that diffusers and transformers call `name`. A name that SDXL lacks is a KeyError."""
    if component == "text_encoder_2":
        return _open_clip_source(name)
    to_sgm = {"unet": _unet_name, "vae": _vae_name, "text_encoder": str}[component]
    return Source(PREFIXES[component] + to_sgm(name))


def _unet_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module in _UNET_ENDS:
        return f"{_UNET_ENDS[module]}.{kind}"
    found = re.fullmatch(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name)
    if not found:
        raise KeyError(name)
    side, block, family, layer, inner = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    if family == "downsamplers":
        return f"input_blocks.{3 * block + 3}.0.{inner.replace('conv.', 'op.')}"
    if family == "upsamplers":
        return f"output_blocks.{3 * block + 2}.2.{inner}"
    if side is None:
        module_name = "middle_block.1" if family == "attentions" else f"middle_block.{2 * layer}"
    else:
        first = f"input_blocks.{3 * block + layer + 1}" if side == "down" else f"output_blocks.{3 * block + layer}"
        module_name = f"{first}.{int(family == 'attentions')}"
    if family == "attentions":
        return f"{module_name}.{inner}"
    module, _, kind = inner.rpartition(".")
    return f"{module_name}.{_RESNET[module]}.{kind}"


def _vae_name(name: str) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda found: f"up.{3 - int(found[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda found: f"up.{3 - int(found[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    attention = re.fullmatch(r"(.+)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", name)
    return f"{attention[1]}.mid.attn_1.{_VAE_ATTENTION[attention[2]]}.{attention[3]}" if attention else name


def _open_clip_source(name: str) -> Source:
    prefix = PREFIXES["text_encoder_2"]
    if name == "text_projection.weight":
        return Source(f"{prefix}text_projection", transposed=True)
    inner = name.removeprefix("text_model.")
    if inner in _OPEN_CLIP_ENDS:
        return Source(prefix + _OPEN_CLIP_ENDS[inner])
    found = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", inner)
    if not found:
        raise KeyError(name)
    layer, module, kind = f"{prefix}transformer.resblocks.{found[1]}", found[2], found[3]
    if module.startswith("self_attn.") and module.removeprefix("self_attn.") in _QKV:
        return Source(f"{layer}.attn.in_proj_{kind}", third=_QKV.index(module.removeprefix("self_attn.")))
    return Source(f"{layer}.{_OPEN_CLIP_LAYER[module]}.{kind}")


def name_in_files(component: str, weight: str) -> str:
    """The name in a file of the weight `weight` of a module: CLIPTextModel lost its `text_model.` in transformers 5.6."""
    return weight if component != "text_encoder" or weight.startswith("text_model.") else f"text_model.{weight}"
