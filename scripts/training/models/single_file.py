"""A base model as one `.safetensors` in the original (sgm) layout, recognised by its header alone.

The file carries no configuration. What SDXL is (its blocks, their depth, heads of 64 channels) is written here; widths,
number of layers and vocabulary size are read from the shapes of the tensors.
"""

import re
from dataclasses import replace
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from common.errors import ModelError, bullet_list
from common.weights import WeightsFile, read_header
from training.models.sdxl import LABELS, OTHER_INPUT_CHANNELS, PREFIXES, REQUIRED_WEIGHTS, BaseModel, Component, Schedule

HEAD_CHANNELS = 64

TIME_IDS = 6
"""Numbers that the UNet is given beside the pooled text: original size, crop, target size."""

_OTHER_MODELS = (
    (r"lora[_.]|lokr_w|hada_w|dora_scale", "is a LoRA, not a base model"),
    (r"^control_model\.|^input_hint_block\.|^controlnet_", "is a ControlNet, not a base model"),
    (r"^cond_stage_model\.transformer\.", "is an SD 1.x model; LoRACat trains on SDXL base models"),
    (r"^cond_stage_model\.model\.", "is an SD 2.x model; LoRACat trains on SDXL base models"),
    (r"^conditioner\.embedders\.0\.model\.", "is the SDXL refiner; LoRACat trains on SDXL base models"),
    (r"^(model\.diffusion_model\.)?(double_blocks|joint_blocks)\.", "is a Flux or SD 3 model; LoRACat trains on SDXL base models"),
)
"""Names of tensors in files that lack a component of SDXL, and what such a file is."""

_SINGLE_COMPONENTS = (
    (r"^(down_blocks|input_blocks)\.", "a UNet"),
    (r"^encoder\.down", "a VAE"),
    (r"text_model\.|resblocks\.", "a text encoder"),
)
"""Names of tensors in a file that holds one network without the prefixes of a whole checkpoint."""

_DEPTHS = {"input_blocks.4.1": 2, "input_blocks.7.1": 10, "middle_block.1": 10}
"""Transformer blocks in some of the UNet's attention modules."""


def read_file(path: Path) -> BaseModel:
    """The base model in the file `path`. Raises ModelError with everything that is wrong with it."""
    file = read_header(path)
    if other := _other_model(file):
        raise ModelError(f"{path}: {other}")
    components = [Component(name, {}, (file,), in_single_file=True) for name in PREFIXES]
    if problems := [problem for component in components for problem in component.problems() or _wrong_shapes(component)]:
        raise ModelError(bullet_list(f"{path}: this base model cannot be used:", problems))
    if variant := _variant_of_sdxl(file):
        raise ModelError(f"{path}: {variant}; LoRACat trains on SDXL base models")
    configs = infer_configs(file)
    return BaseModel(path, {c.name: replace(c, config=configs[c.name]) for c in components}, _schedule(file))


def infer_configs(file: WeightsFile) -> dict[str, dict[str, Any]]:
    """The configuration of each component, as diffusers and transformers read it, of a file with all REQUIRED_WEIGHTS."""
    clip_l, clip_g = _clip_config(file, "text_encoder", "quick_gelu"), _clip_config(file, "text_encoder_2", "gelu")
    unet = _unet_config(file, pooled=clip_g["projection_dim"])
    return {"unet": unet, "vae": _vae_config(file), "text_encoder": clip_l, "text_encoder_2": clip_g}


def _wrong_shapes(component: Component) -> list[str]:
    """Problems with the shapes from which the configuration is inferred: true ones have these numbers of sizes, none of them 0."""
    for weight, original in REQUIRED_WEIGHTS[component.name].items():
        shape = component.required_tensor(weight, original).shape
        dimensions = 4 if "conv" in weight or "out_layers" in original else 2
        if len(shape) < 2 or len(shape) > dimensions or 0 in shape:
            return [f"{component.name}: {weight} has the shape {list(shape)}, which is not that of an SDXL model"]
    return []


def _other_model(file: WeightsFile) -> str | None:
    """What a file is that lacks a component of SDXL."""
    missing = [name for name, prefix in PREFIXES.items() if not any(key.startswith(prefix) for key in file.tensors)]
    if not missing:
        return None
    for pattern, description in _OTHER_MODELS:
        if any(re.search(pattern, key) for key in file.tensors):
            return description
    if len(missing) == len(PREFIXES):
        for pattern, component in _SINGLE_COMPONENTS:
            if any(re.search(pattern, key) for key in file.tensors):
                return f"holds only {component}; use the whole checkpoint"
        return "holds no component of an SDXL model"
    present = ", ".join(label for name, label in LABELS.items() if name not in missing)
    absent = ", ".join(LABELS[name] for name in missing)
    return f"holds only {present}, and no {absent}; use the whole checkpoint"


def _variant_of_sdxl(file: WeightsFile) -> str | None:
    """How a file with all components differs from SDXL."""
    if any(key.startswith(("edm_mean", "edm_std", "edm_vpred.")) for key in file.tensors):
        return "is an EDM model, such as Playground v2.5 or CosXL"
    unet = PREFIXES["unet"]
    channels = file.tensors[f"{unet}input_blocks.0.0.weight"].shape[1]
    if channels != 4:
        return f"is {OTHER_INPUT_CHANNELS.get(channels, 'a variant of SDXL')} ({channels} input channels)"
    for module, expected in _DEPTHS.items():
        depth = _count_layers(file, f"{unet}{module}.transformer_blocks.{{}}.norm1.weight")
        if depth != expected:
            return f"has other blocks than SDXL's, as SSD-1B, Vega and KOALA have ({module} has {depth} instead of {expected})"
    return None


def _schedule(file: WeightsFile) -> Schedule:
    """From ComfyUI's marker keys, of which `ztsnr` counts only beside `v_pred`; else from the modelspec metadata."""
    if "v_pred" in file.tensors:
        return Schedule("v_prediction", zero_terminal_snr="ztsnr" in file.tensors)
    declared = {file.metadata.get(f"modelspec.{key}") for key in ("prediction_type", "predict_key")}
    return Schedule("v_prediction" if declared & {"v", "v_prediction"} else "epsilon")


def _unet_config(file: WeightsFile, pooled: int) -> dict[str, Any]:
    shapes = _shapes(file, "unet")
    widths = [shapes["conv_in.weight"][0]]
    widths += [shapes[f"down_blocks.{block}.resnets.0.conv2.weight"][0] for block in (1, 2)]
    added = shapes["add_embedding.linear_1.weight"][1]
    return {
        "sample_size": 128,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": widths,
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [max(1, width // HEAD_CHANNELS) for width in widths],  # diffusers means the number of heads
        "cross_attention_dim": shapes["down_blocks.2.attentions.0.transformer_blocks.0.attn2.to_k.weight"][1],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": (added - pooled) // TIME_IDS,
        "projection_class_embeddings_input_dim": added,
    }


def _vae_config(file: WeightsFile) -> dict[str, Any]:
    shapes = _shapes(file, "vae")
    return {
        "sample_size": 1024,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [shapes[f"encoder.down_blocks.{block}.resnets.0.conv1.weight"][0] for block in range(4)],
        "layers_per_block": 2,
        "latent_channels": 4,
        "scaling_factor": 0.13025,
        "force_upcast": True,
    }


def _clip_config(file: WeightsFile, name: str, activation: str) -> dict[str, Any]:
    shapes = _shapes(file, name)
    first_layer = "text_model.encoder.layers.0.mlp.fc1.weight"
    spellings = (REQUIRED_WEIGHTS[name][first_layer], first_layer, first_layer.removeprefix("text_model."))
    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes[first_layer][0],
        "projection_dim": shapes.get("text_projection.weight", (width,))[0],
        "num_hidden_layers": max(_count_layers(file, PREFIXES[name] + spelling.replace(".0.", ".{}.")) for spelling in spellings),
        "num_attention_heads": max(1, width // HEAD_CHANNELS),
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
        "hidden_act": activation,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": 1,
    }


def _shapes(file: WeightsFile, name: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the required weights of the component, as diffusers and transformers name and store them."""
    component = Component(name, {}, (file,), in_single_file=True)
    stored = {weight: component.required_tensor(weight, original) for weight, original in REQUIRED_WEIGHTS[name].items()}
    shapes = {weight: tensor.shape for weight, tensor in stored.items() if tensor}
    if f"{PREFIXES[name]}text_projection" in component.tensors:  # OpenCLIP multiplies from the other side
        shapes["text_projection.weight"] = shapes["text_projection.weight"][::-1]
    return shapes


def _count_layers(file: WeightsFile, pattern: str) -> int:
    """How many of the tensors `pattern.format(0)`, `pattern.format(1)`, ... the file has, up to the first missing one."""
    return sum(1 for _ in takewhile(lambda number: pattern.format(number) in file.tensors, count()))
