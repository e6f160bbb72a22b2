"""The noise schedule that a base model was trained with. Pure.

SDXL's original (sgm) layout: where each weight that diffusers and transformers name lies in it. Pure.

A base model's parts: their configurations, and where each weight lies, in diffusers' layout or in the original one.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from training.models.weights import FLOATS, Tensor, WeightsFile, digest

PredictionType = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True)
class Schedule:
    """What the model predicts, and the betas; the defaults are SDXL's."""

    prediction_type: PredictionType = "epsilon"
    zero_terminal_snr: bool = False
    beta_start: float = 0.00085
    beta_end: float = 0.012
    timesteps: int = 1000

    def with_settings(self, prediction_type: str, zero_terminal_snr: bool | str) -> "Schedule":
        """The schedule with what the settings say in place of what the base says; "auto" keeps the base's."""
        kept = self
        if prediction_type != "auto":
            kept = replace(kept, prediction_type=prediction_type)
        if zero_terminal_snr != "auto":
            kept = replace(kept, zero_terminal_snr=zero_terminal_snr)
        return kept


PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
}


@dataclass(frozen=True)
class Source:
    """Where a weight lies in the file."""

    key: str
    third: int | None = None
    """Query, key and value lie in one tensor: which third of its rows this is."""
    transposed: bool = False

    def shape_from(self, stored: tuple[int, ...], dimensions: int) -> tuple[int, ...]:
        """The shape of the weight, which has so many dimensions, from the shape of the tensor that holds it.

        A linear layer may be stored as a 1x1 convolution.
        """
        if self.third is not None:
            stored = (stored[0] // 3, *stored[1:])
        if self.transposed:
            stored = stored[::-1]
        return stored[:dimensions] if set(stored[dimensions:]) == {1} else stored


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


def sgm_source(part: str, name: str) -> Source:
    """Where the file holds the weight that diffusers and transformers call `name`. A name that SDXL lacks is a KeyError."""
    if part == "text_encoder_2":
        return _open_clip_source(name)
    to_sgm = {"unet": _unet_name, "vae": _vae_name, "text_encoder": str}[part]
    return Source(PREFIXES[part] + to_sgm(name))


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
        place = "middle_block.1" if family == "attentions" else f"middle_block.{2 * layer}"
    else:
        first = f"input_blocks.{3 * block + layer + 1}" if side == "down" else f"output_blocks.{3 * block + layer}"
        place = f"{first}.{int(family == 'attentions')}"
    if family == "attentions":
        return f"{place}.{inner}"
    module, _, kind = inner.rpartition(".")
    return f"{place}.{_RESNET[module]}.{kind}"


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


STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
"""The parts, and how the weight files of each begin in a diffusers folder."""


ESSENTIAL = {
    "unet": (
        "conv_in.weight",
        "add_embedding.linear_1.weight",
        "down_blocks.1.resnets.0.conv2.weight",
        "down_blocks.2.resnets.0.conv2.weight",
        "down_blocks.2.attentions.0.transformer_blocks.0.attn2.to_k.weight",
        "conv_out.weight",
    ),
    "vae": ("decoder.conv_out.weight", "quant_conv.weight", *(f"encoder.down_blocks.{i}.resnets.0.conv1.weight" for i in range(4))),
    "text_encoder": (
        "text_model.embeddings.token_embedding.weight",
        "text_model.embeddings.position_embedding.weight",
        "text_model.encoder.layers.0.mlp.fc1.weight",
    ),
    "text_encoder_2": (
        "text_model.embeddings.token_embedding.weight",
        "text_model.embeddings.position_embedding.weight",
        "text_model.encoder.layers.0.mlp.fc1.weight",
        "text_projection.weight",
    ),
}
"""Weights without which a file does not hold the part. All of them are compared when the part is loaded."""


_OLD_VAE_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@dataclass(frozen=True)
class Part:
    """One network of a base model."""

    name: str
    """`unet`, `vae`, `text_encoder` or `text_encoder_2`."""
    config: dict[str, Any]
    """As diffusers and transformers read it."""
    files: tuple[WeightsFile, ...]
    is_sgm: bool
    """The weights lie in one file in the original layout, among those of the other parts."""

    def find(self, weight: str) -> tuple[WeightsFile, Source] | None:
        """Where the weight that the module calls `weight` lies."""
        for source in self._sources(weight):
            for file in self.files:
                if source.key in file.tensors:
                    return file, source
        return None

    def shape(self, weight: str, dimensions: int) -> tuple[int, ...] | None:
        """The shape of the weight, which has so many dimensions, or None if it is missing."""
        found = self.find(weight)
        return found and found[1].shape_from(found[0].tensors[found[1].key].shape, dimensions)

    def misfits(self, shapes: dict[str, tuple[int, ...]]) -> list[str]:
        """What is missing or has another shape than the module expects."""
        there = {weight: self.shape(weight, len(shape)) for weight, shape in shapes.items()}
        missing = [f"{weight} is missing" for weight in shapes if there[weight] is None]
        odd = [weight for weight, shape in shapes.items() if there[weight] not in (None, shape)]
        return missing + [f"{weight} has the shape {there[weight]} instead of {shapes[weight]}" for weight in odd]

    def problems(self) -> list[str]:
        """What the headers of the files say is wrong."""
        missing = [weight for weight in ESSENTIAL[self.name] if self.find(weight) is None]
        if missing:
            return [f"{self.name}: its weights lack {missing[0]}"]
        odd = {tensor.dtype for tensor in self.tensors.values()} - {*FLOATS, "I64", "I32"}
        return [f"{self.name}: its weights are quantised ({', '.join(sorted(odd))}): use fp16, bf16 or fp32"] if odd else []

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The part's own tensors in its files."""
        prefix = PREFIXES[self.name] if self.is_sgm else ""
        return {key: tensor for file in self.files for key, tensor in file.tensors.items() if key.startswith(prefix)}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the part's weights, the key of what is derived from them. Reads them all, once."""
        return digest((file, [key for key in file.tensors if key in self.tensors]) for file in self.files)

    def _sources(self, weight: str) -> Iterator[Source]:
        """Where the weight may lie; the usual place first."""
        name = name_in_files(self.name, weight)
        if self.is_sgm:
            yield sgm_source(self.name, name)
            if name == "text_projection.weight":
                yield Source(PREFIXES[self.name] + name)
            return
        yield Source(name)
        yield Source(name.removeprefix("text_model."))
        for new, old in _OLD_VAE_NAMES.items():
            if self.name == "vae" and f".{new}." in name:
                yield Source(name.replace(new, old))


@dataclass(frozen=True)
class BaseModel:
    """A base model that can be trained on."""

    path: Path
    """The diffusers folder, or the single file."""
    parts: dict[str, Part]
    schedule: Schedule
    """What it predicts, as it says itself."""

    @property
    def name(self) -> str:
        return self.path.stem if self.path.is_file() else self.path.name


def name_in_files(part: str, weight: str) -> str:
    """The name in a file of the weight `weight` of a module: CLIPTextModel lost its `text_model.` in transformers 5.6."""
    return weight if part != "text_encoder" or weight.startswith("text_model.") else f"text_model.{weight}"
