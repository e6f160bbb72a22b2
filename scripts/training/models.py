"""Load the frozen parts of the base model, each alone, straight from its files onto the device."""

from contextlib import ExitStack
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from errors import ModelError, one_list
from training.base_model import fetch_tokenizers, find_tokenizers
from training.diffusers_folder import TOKENIZERS
from training.parts import BaseModel, Part
from training.sgm_names import Source
from training.text import TextEncoders


def load_vae(base: BaseModel, device: torch.device) -> AutoencoderKL:
    """The VAE, frozen, in float32: SDXL's overflows in float16."""
    part = base.parts["vae"]
    with init_empty_weights():
        vae = AutoencoderKL.from_config(part.config)
    return _filled(vae, part, device, torch.float32)


def load_text_encoders(base: BaseModel, models_dir: Path, device: torch.device, dtype: torch.dtype) -> TextEncoders:
    """Both text encoders, frozen, with their tokenizers."""
    encoders = []
    for name, encoder_class in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        part = base.parts[name]
        with init_empty_weights():
            encoder = encoder_class(CLIPTextConfig.from_dict(part.config))
        encoders.append(_filled(encoder, part, device, dtype))
    return TextEncoders(load_tokenizers(base, models_dir), tuple(encoders))


def load_unet(base: BaseModel, device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
    """The UNet, frozen."""
    part = base.parts["unet"]
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(part.config)
    return _filled(unet, part, device, dtype)


def load_tokenizers(base: BaseModel, models_dir: Path) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """The tokenizers of the two text encoders. For a single file they are fetched once if no folder in `models_dir` has them."""
    folder = find_tokenizers(base, models_dir) or fetch_tokenizers(models_dir)
    first, second = (CLIPTokenizer.from_pretrained(folder / name, local_files_only=True) for name in TOKENIZERS)
    return first, second


def _filled(module: torch.nn.Module, part: Part, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """`module`, which has no weights yet, with those of `part`: frozen, in `dtype`, on `device`.

    Raises ModelError if they do not fit.
    """
    expected = {name: tuple(empty.shape) for name, empty in module.state_dict().items()}
    misfits = part.misfits(expected)
    if misfits:
        shown = [*misfits[:5], *([f"and {len(misfits) - 5} more"] if len(misfits) > 5 else [])]
        raise ModelError(one_list(f"{part.files[0].path}: the weights of {part.name} do not fit SDXL:", shown))
    loaded = {}
    with ExitStack() as stack:
        opened = {file.path: stack.enter_context(safe_open(file.path, "pt", str(device))) for file in part.files}
        for name, shape in expected.items():
            file, source = part.find(name)
            loaded[name] = _read(opened[file.path], source).reshape(shape).to(dtype)
    module.load_state_dict(loaded, assign=True)
    return module.to(device).requires_grad_(False).eval()


def _read(opened: safe_open, source: Source) -> torch.Tensor:
    """The stored tensor as the weight that it stands for."""
    if source.third is None:
        tensor = opened.get_tensor(source.key)
        return tensor.T.contiguous() if source.transposed else tensor
    rows = opened.get_slice(source.key)
    height = rows.get_shape()[0] // 3
    return rows[source.third * height : (source.third + 1) * height]
