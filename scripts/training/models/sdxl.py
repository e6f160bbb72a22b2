"""What is SDXL's own: its four components, the weights that each needs, and the noise schedule. Imports no torch."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from common.weights import FLOAT_BYTES, StoredTensor, WeightsFile, digest

PredictionType = Literal["epsilon", "v_prediction"]

WEIGHT_STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
"""The components, and how the names of their weight files begin in a diffusers folder."""

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
"""CLIP-L and CLIP-G."""

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
}
"""How the names of their weights begin in a single file, which has the original (sgm) layout."""

REQUIRED_WEIGHTS = {
    "unet": {
        "conv_in.weight": "input_blocks.0.0.weight",
        "add_embedding.linear_1.weight": "label_emb.0.0.weight",
        "down_blocks.1.resnets.0.conv2.weight": "input_blocks.4.0.out_layers.3.weight",
        "down_blocks.2.resnets.0.conv2.weight": "input_blocks.7.0.out_layers.3.weight",
        "down_blocks.2.attentions.0.transformer_blocks.0.attn2.to_k.weight": (
            "input_blocks.7.1.transformer_blocks.0.attn2.to_k.weight"
        ),
        "conv_out.weight": "out.2.weight",
    },
    "vae": {
        "decoder.conv_out.weight": "decoder.conv_out.weight",
        "quant_conv.weight": "quant_conv.weight",
        **{f"encoder.down_blocks.{i}.resnets.0.conv1.weight": f"encoder.down.{i}.block.0.conv1.weight" for i in range(4)},
    },
    "text_encoder": {
        "text_model.embeddings.token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "text_model.embeddings.position_embedding.weight",
        "text_model.encoder.layers.0.mlp.fc1.weight": "text_model.encoder.layers.0.mlp.fc1.weight",
    },
    "text_encoder_2": {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.encoder.layers.0.mlp.fc1.weight": "transformer.resblocks.0.mlp.c_fc.weight",
        "text_projection.weight": "text_projection",
    },
}
"""Weights without which a file does not hold the component, and their names in a single file: a check of the headers alone.
All weights are compared with the network when it is built."""

LABELS = {"unet": "UNet", "vae": "VAE", "text_encoder": "text encoder CLIP-L", "text_encoder_2": "text encoder CLIP-G"}

OTHER_INPUT_CHANNELS = {8: "an instruct-pix2pix model", 9: "an inpainting model"}
"""SDXL's UNet has 4."""


@dataclass(frozen=True)
class Schedule:
    """What the model predicts, and the noise it was trained with; the defaults are SDXL's."""

    prediction_type: PredictionType = "epsilon"
    zero_terminal_snr: bool = False
    beta_start: float = 0.00085
    beta_end: float = 0.012
    timesteps: int = 1000

    def with_settings(self, prediction_type: str, zero_terminal_snr: bool | str) -> "Schedule":
        """The schedule with the settings in place of the base model's values; "auto" keeps the base model's."""
        changes = {"prediction_type": prediction_type, "zero_terminal_snr": zero_terminal_snr}
        return replace(self, **{name: value for name, value in changes.items() if value != "auto"})


@dataclass(frozen=True)
class Component:
    """One network of a base model: its configuration and its weight files."""

    name: str
    """`unet`, `vae`, `text_encoder` or `text_encoder_2`."""
    config: dict[str, Any]
    """As diffusers and transformers read it."""
    files: tuple[WeightsFile, ...]
    in_single_file: bool
    """The weights are in one file with those of the other components, in the original layout."""

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """The component's own tensors, under their names in the files."""
        prefix = PREFIXES[self.name] if self.in_single_file else ""
        return {key: tensor for file in self.files for key, tensor in file.tensors.items() if key.startswith(prefix)}

    @property
    def label(self) -> str:
        """What messages call it."""
        return LABELS[self.name]

    def file_of(self, tensor: str) -> Path:
        """The file that holds one of `tensors`; of several with that name the last, as in `tensors`."""
        return next(file.path for file in reversed(self.files) if tensor in file.tensors)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights, the key of everything that is computed from them. Reads all of them, once."""
        return digest((file, [key for key in file.tensors if key in self.tensors]) for file in self.files)

    @cached_property
    def has_original_names(self) -> bool:
        """Whether the weights have the names of the original layout. In a single file, the VAE and the text encoders may also have
        diffusers' and transformers' names."""
        named = REQUIRED_WEIGHTS[self.name].items()
        return self.in_single_file and any(PREFIXES[self.name] + old in self.tensors for new, old in named if new != old)

    def required_tensor(self, weight: str, original: str) -> StoredTensor | None:
        """One of REQUIRED_WEIGHTS, under any of the names that it has in files; None if it is missing."""
        # CLIPTextModel lost its `text_model.` in transformers 5.6.
        spellings = [weight, weight.removeprefix("text_model.")]
        if self.in_single_file:
            prefix = PREFIXES[self.name]
            others = [] if self.name == "unet" else [prefix + spelling for spelling in spellings]
            spellings = [prefix + original, *others]
        return next((self.tensors[spelling] for spelling in spellings if spelling in self.tensors), None)

    def problems(self) -> list[str]:
        """What the headers of the files show to be wrong."""
        for weight, original in REQUIRED_WEIGHTS[self.name].items():
            if self.required_tensor(weight, original) is None:
                return [f"{self.name}: its weights lack {weight}"]
        unknown = {tensor.dtype for tensor in self.tensors.values()} - {*FLOAT_BYTES, "I64", "I32"}
        if unknown:
            return [f"{self.name}: its weights are quantised ({', '.join(sorted(unknown))}): use fp16, bf16 or fp32 weights"]
        return []


@dataclass(frozen=True)
class BaseModel:
    """A base model that can be trained on."""

    path: Path
    """The diffusers folder, or the single file."""
    components: dict[str, Component]
    schedule: Schedule
    """As the base model declares it."""

    @property
    def name(self) -> str:
        """File or folder name without suffix, for the metadata of the LoRA."""
        return self.path.stem if self.path.is_file() else self.path.name
