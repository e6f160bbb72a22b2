"""A base model as one `.safetensors` in the original (sgm) layout.

The file carries no configuration. What SDXL is (its blocks, their depth, heads of 64 channels) is written here; widths,
layers and the vocabulary are read from the shapes of the tensors.
"""

import re
from collections.abc import Callable
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from common.errors import ModelError, bullet_list
from training.models.sdxl import PREFIXES, STEMS, BaseModel, Part, Schedule
from training.models.weights import WeightsFile, read_header

HEAD_CHANNELS = 64


TIME_IDS = 6
"""Numbers that the UNet is told beside the pooled text: original size, crop, target size."""


_OTHER_MODELS = (
    (r"lora[_.]|lokr_w|hada_w|dora_scale", "is a LoRA, not a base model"),
    (r"^control_model\.|^input_hint_block\.|^controlnet_", "is a ControlNet, not a base model"),
    (r"^cond_stage_model\.transformer\.", "is an SD 1.x model; LoRACat trains on SDXL base models"),
    (r"^cond_stage_model\.model\.", "is an SD 2.x model; LoRACat trains on SDXL base models"),
    (r"^conditioner\.embedders\.0\.model\.", "is the SDXL refiner; LoRACat trains on SDXL base models"),
    (r"^(model\.diffusion_model\.)?(double_blocks|joint_blocks)\.", "is a Flux or SD 3 model; LoRACat trains on SDXL base models"),
)
"""What a file without all parts of SDXL may be."""


_LONE_PARTS = (
    (r"^(down_blocks|input_blocks)\.", "a UNet"),
    (r"^encoder\.down", "a VAE"),
    (r"text_model\.|resblocks\.", "a text encoder"),
)


_PART_NAMES = {"unet": "UNet", "vae": "VAE", "text_encoder": "text encoder CLIP-L", "text_encoder_2": "text encoder CLIP-G"}


_DEPTHS = {"input_blocks.4.1": 2, "input_blocks.7.1": 10, "middle_block.1": 10}
"""Transformer blocks in some of the UNet's attention modules."""


def read_file(path: Path) -> BaseModel:
    """The base model in the file `path`. Raises ModelError with everything that is wrong with it."""
    file = read_header(path)
    another = _another_model(file)
    if another:
        raise ModelError(f"{path}: {another}")
    problems = [problem for part in _unconfigured(file).values() for problem in part.problems()]
    if problems:
        raise ModelError(bullet_list(f"{path}: this base model cannot be used:", problems))
    variant = _variant_of_sdxl(file)
    if variant:
        raise ModelError(f"{path}: {variant}; LoRACat trains on SDXL base models")
    configured = {name: Part(name, config, (file,), is_sgm=True) for name, config in configurations(file).items()}
    return BaseModel(path, configured, _schedule(file))


def configurations(file: WeightsFile) -> dict[str, dict[str, Any]]:
    """The configuration of each part, as diffusers and transformers read it, of a file that holds what is essential."""
    parts = _unconfigured(file)
    return {
        "unet": _unet_configuration(parts["unet"], parts["text_encoder_2"]),
        "vae": _vae_configuration(parts["vae"]),
        "text_encoder": _clip_configuration(parts["text_encoder"], "quick_gelu"),
        "text_encoder_2": _clip_configuration(parts["text_encoder_2"], "gelu"),
    }


def _unconfigured(file: WeightsFile) -> dict[str, Part]:
    return {name: Part(name, {}, (file,), is_sgm=True) for name in STEMS}


def _another_model(file: WeightsFile) -> str | None:
    """What a file is that does not hold all parts of SDXL."""
    missing = [name for name, prefix in PREFIXES.items() if not any(key.startswith(prefix) for key in file.tensors)]
    if not missing:
        return None
    for pattern, what in _OTHER_MODELS:
        if any(re.search(pattern, key) for key in file.tensors):
            return what
    if len(missing) == len(PREFIXES):
        lone = next((part for pattern, part in _LONE_PARTS if any(re.search(pattern, key) for key in file.tensors)), None)
        return f"holds only {lone}; use the whole checkpoint" if lone else "holds no part of an SDXL model"
    there = ", ".join(_PART_NAMES[name] for name in PREFIXES if name not in missing)
    lacking = ", ".join(_PART_NAMES[name] for name in missing)
    return f"holds only {there}, and no {lacking}; use the whole checkpoint"


def _variant_of_sdxl(file: WeightsFile) -> str | None:
    """How a file with all parts differs from SDXL."""
    if any(key.startswith(("edm_mean", "edm_std", "edm_vpred.")) for key in file.tensors):
        return "is an EDM model, such as Playground v2.5 or CosXL"
    prefix = PREFIXES["unet"]
    channels = file.tensors[f"{prefix}input_blocks.0.0.weight"].shape[1]
    if channels != 4:
        kind = {8: "an instruct-pix2pix model", 9: "an inpainting model"}.get(channels, "no plain SDXL model")
        return f"is {kind} ({channels} input channels)"
    for place, wanted in _DEPTHS.items():
        blocks = f"{prefix}{place}.transformer_blocks"
        depth = _run_length(lambda block, blocks=blocks: f"{blocks}.{block}.norm1.weight" in file.tensors)
        if depth != wanted:
            return f"has other blocks than SDXL's, as SSD-1B, Vega and KOALA have ({place} has {depth} instead of {wanted})"
    return None


def _schedule(file: WeightsFile) -> Schedule:
    """From ComfyUI's marker keys, of which `ztsnr` counts beside `v_pred` only; else from the modelspec metadata."""
    if "v_pred" in file.tensors:
        return Schedule("v_prediction", zero_terminal_snr="ztsnr" in file.tensors)
    said = {file.metadata.get(f"modelspec.{key}") for key in ("prediction_type", "predict_key")}
    return Schedule("v_prediction" if said & {"v", "v_prediction"} else "epsilon")


def _unet_configuration(unet: Part, text_encoder_2: Part) -> dict[str, Any]:
    widths = [unet.shape("conv_in.weight", 4)[0]]
    widths += [unet.shape(f"down_blocks.{block}.resnets.0.conv2.weight", 4)[0] for block in (1, 2)]
    added = unet.shape("add_embedding.linear_1.weight", 2)[1]
    pooled = text_encoder_2.shape("text_projection.weight", 2)[0]
    return {
        "sample_size": 128,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": widths,
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [_heads(width) for width in widths],  # diffusers means the number of heads
        "cross_attention_dim": unet.shape("down_blocks.2.attentions.0.transformer_blocks.0.attn2.to_k.weight", 2)[1],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": (added - pooled) // TIME_IDS,
        "projection_class_embeddings_input_dim": added,
    }


def _vae_configuration(vae: Part) -> dict[str, Any]:
    return {
        "sample_size": 1024,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [vae.shape(f"encoder.down_blocks.{block}.resnets.0.conv1.weight", 4)[0] for block in range(4)],
        "layers_per_block": 2,
        "latent_channels": 4,
        "scaling_factor": 0.13025,
        "force_upcast": True,
    }


def _clip_configuration(clip: Part, activation: str) -> dict[str, Any]:
    vocabulary, width = clip.shape("text_model.embeddings.token_embedding.weight", 2)
    projection = clip.shape("text_projection.weight", 2)
    layer = "text_model.encoder.layers.{}.mlp.fc1.weight"
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": clip.shape(layer.format(0), 2)[0],
        "projection_dim": projection[0] if projection else width,
        "num_hidden_layers": _run_length(lambda number: clip.find(layer.format(number)) is not None),
        "num_attention_heads": _heads(width),
        "max_position_embeddings": clip.shape("text_model.embeddings.position_embedding.weight", 2)[0],
        "hidden_act": activation,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": 1,
    }


def _heads(width: int) -> int:
    return max(1, width // HEAD_CHANNELS)


def _run_length(holds: Callable[[int], bool]) -> int:
    """How many of the numbers 0, 1, 2 ... in a row `holds` is true for."""
    return sum(1 for _ in takewhile(holds, count()))
