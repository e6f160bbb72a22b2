"""A base model's parts: their configurations, and where each weight lies, in diffusers' layout or in the original one."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from training.schedule import Schedule
from training.sgm_names import PREFIXES, Source, sgm_source
from training.weights import FLOATS, Tensor, WeightsFile, digest

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

    def complaints(self) -> list[str]:
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
