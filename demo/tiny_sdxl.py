"""SDXL with random weights: the real architecture and file layout, in small widths or in its own.

`build` writes a diffusers folder, `write_single_file` the same weights as one checkpoint in the original (sgm) layout.
Every tensor is random, norms and biases too, so that a weight in the wrong place is noticed.
`scripts/` must be on sys.path.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from demo.sgm_names import name_in_files, sgm_source
from training.models.sdxl import WEIGHT_STEMS
from training.models.weights import shapes_only


@dataclass(frozen=True)
class Size:
    """Dimensions of an SDXL; widths are in channels, text encoders are (width, layers, heads, projection)."""

    unet: tuple[int, int, int] = (32, 64, 32)
    heads: tuple[int, int, int] = (1, 1, 1)
    groups: int = 32
    """Of channels, in the norms of UNet and VAE. SDXL's have 4 channels and more each: a norm of one channel removes what is the
    same everywhere in it, such as what the UNet adds for the timestep and the pooled text."""
    time_ids: int = 8
    """Channels for each number of the size conditioning."""
    vae: tuple[int, int, int, int] = (32, 32, 32, 32)
    clip_l: tuple[int, int, int, int] = (32, 2, 1, 32)
    clip_g: tuple[int, int, int, int] = (64, 3, 1, 64)
    words: int = 0
    """Rows of the token embeddings; at least the size of the vocabulary, which is always small."""


TINY = Size()
FULL = Size(
    unet=(320, 640, 1280),
    heads=(5, 10, 20),
    time_ids=256,
    vae=(128, 256, 512, 512),
    clip_l=(768, 12, 12, 768),
    clip_g=(1280, 32, 20, 1280),
    words=49408,
)
"""Stability AI's SDXL 1.0: 2.57 billion weights in the UNet, 7 GB in all."""
START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = ("a n", "i n", "e r", "an d</w>", "r e", "1 g", "i r", "1g ir", "1gir l</w>", "s m", "i l", "sm il", "smil e</w>")
"""Enough to make some words one token and leave others in pieces."""


def build(
    folder: Path,
    *,
    prediction_type: str = "epsilon",
    zero_terminal_snr: bool = False,
    seed: int = 0,
    size: Size = TINY,
    device: str = "cpu",
    merges: Sequence[str] = MERGES,
) -> Path:
    """Write the model to `folder` in diffusers' layout, fp16 weights (tiny: about 17 MB), and return `folder`.

    The weights are drawn on `device`; another kind of device draws other weights. `merges` are those of the tokenizers.
    """
    generator = torch.Generator(device).manual_seed(seed)
    vocabulary = _vocabulary(merges)
    for name, module in networks(size, len(vocabulary)).items():
        weights = {name_in_files(name, key): _random(key, empty, generator).cpu() for key, empty in module.state_dict().items()}
        (folder / name).mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / name / f"{WEIGHT_STEMS[name]}.safetensors", metadata={"format": "pt"})
        module.config.architectures = [type(module).__name__]
        _write_json(folder / name / "config.json", _plain_config(module))
    _write_tokenizer(folder / "tokenizer", vocabulary, merges, pad=END)
    _write_tokenizer(folder / "tokenizer_2", vocabulary, merges, pad="!")
    _write_json(folder / "scheduler" / "scheduler_config.json", _scheduler(prediction_type, zero_terminal_snr))
    _write_json(folder / "model_index.json", _model_index())
    return folder


def write_single_file(folder: Path, file: Path, *, v_pred: bool = False, ztsnr: bool = False) -> Path:
    """Write the weights of the diffusers `folder` to `file` in the original layout, with the requested marker keys."""
    weights: dict[str, torch.Tensor] = {}
    pieces: dict[str, dict[int, torch.Tensor]] = {}
    for part, stem in WEIGHT_STEMS.items():
        for name, tensor in load_file(folder / part / f"{stem}.safetensors").items():
            source = sgm_source(part, name)
            tensor = tensor.T.contiguous() if source.transposed else tensor
            if source.third is None:
                weights[source.key] = tensor[..., None, None] if _is_convolution(source.key, tensor) else tensor
            else:
                pieces.setdefault(source.key, {})[source.third] = tensor
    weights |= {key: torch.cat([thirds[0], thirds[1], thirds[2]]) for key, thirds in pieces.items()}
    weights |= {name: torch.zeros(0) for name, enabled in (("v_pred", v_pred), ("ztsnr", ztsnr)) if enabled}
    weights["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(weights, file, metadata={"format": "pt"})
    return file


def networks(size: Size, words: int = 0) -> dict[str, torch.nn.Module]:
    """The four networks on the meta device; `words` where a vocabulary has more than `size` says."""
    words = max(words, size.words)
    pooled = size.clip_g[3]
    with shapes_only():
        unet = UNet2DConditionModel(
            sample_size=16,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=size.unet,
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=size.heads,
            norm_num_groups=size.groups,
            cross_attention_dim=size.clip_l[0] + size.clip_g[0],
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=size.time_ids,
            projection_class_embeddings_input_dim=pooled + 6 * size.time_ids,
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=size.vae,
            layers_per_block=2,
            norm_num_groups=min(size.groups, size.vae[0]),
            latent_channels=4,
            scaling_factor=0.13025,
        )
        return {
            "unet": unet,
            "vae": vae,
            "text_encoder": CLIPTextModel(_clip_config(*size.clip_l, "quick_gelu", words)),
            "text_encoder_2": CLIPTextModelWithProjection(_clip_config(*size.clip_g, "gelu", words)),
        }


def _clip_config(hidden: int, layers: int, heads: int, projection: int, activation: str, words: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=words,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        projection_dim=projection,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=77,
        hidden_act=activation,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )


def _random(name: str, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Weights that keep the variance of a signal; norms near one, biases near zero."""
    noise = torch.randn(like.shape, generator=generator, device=generator.device)
    if name.endswith("bias"):
        return (0.02 * noise).half()
    if like.ndim == 1:
        return (1 + 0.1 * noise).half()
    return (noise / math.sqrt(math.prod(like.shape[1:]))).half()


def _plain_config(module: torch.nn.Module) -> dict:
    config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
    if not isinstance(module, UNet2DConditionModel | AutoencoderKL):
        return config
    return {"_class_name": type(module).__name__} | {key: value for key, value in config.items() if key != "_use_default_values"}


def _vocabulary(merges: Sequence[str]) -> dict[str, int]:
    """CLIP's order: every byte, every byte that ends a word, what the merges make, the two special tokens."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in printable] + [chr(256 + position) for position in range(256 - len(printable))]
    merged = [merge.replace(" ", "") for merge in merges]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *merged, START, END]
    return {word: position for position, word in enumerate(words)}


def _write_tokenizer(folder: Path, vocabulary: dict[str, int], merges: Sequence[str], pad: str) -> None:
    _write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "pad_token": pad, "unk_token": END}
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, "add_prefix_space": False},
    )


def _scheduler(prediction_type: str, zero_terminal_snr: bool) -> dict:
    return {
        "_class_name": "EulerDiscreteScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": prediction_type,
        "rescale_betas_zero_snr": zero_terminal_snr,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "trained_betas": None,
    }


def _model_index() -> dict:
    return {
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": "0.19.0",
        "force_zeros_for_empty_prompt": True,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _is_convolution(key: str, tensor: torch.Tensor) -> bool:
    """The VAE's attention is made of 1x1 convolutions in the original layout."""
    return "mid.attn_1." in key and tensor.ndim == 2


def _write_json(file: Path, content: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
