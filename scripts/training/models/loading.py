"""What training takes from diffusers, transformers and PEFT.

Networks without memory: their weights have a shape, until others take their place.

Load the frozen parts of the base model, each alone, straight from its files onto the device.
"""

import contextlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from safetensors import safe_open
from torch.overrides import TorchFunctionMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from common.background import prefetch
from common.errors import ModelError, bullet_list
from training.models.base_model import TOKENIZERS, tokenizers_of
from training.models.sdxl import BaseModel, Part, Source

__all__ = [
    "AutoencoderKL",
    "BasicTransformerBlock",
    "CLIPTextConfig",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPTokenizer",
    "LoraConfig",
    "LoraLinear",
    "ResnetBlock2D",
    "Transformer2DModel",
    "UNet2DConditionModel",
    "inject_adapter_in_model",
]


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Modules that are made in this block are on the meta device; only buffers that no file holds are real.

    Nothing global is patched: another thread may make or load another network at the same time.
    """
    with torch.device("meta"), _Unfilled():
        yield


class _Unfilled(TorchFunctionMode):
    """Weights that are made are not filled: it would take seconds, and torch's compiler, to fill what has no memory.
    Positions, which no file holds, are counted on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        if function is torch.arange:
            kwargs = {"device": "cpu"} | kwargs
        return function(*args, **kwargs)


Tokenizers = tuple[CLIPTokenizer, CLIPTokenizer]


@dataclass(frozen=True)
class TextEncoders:
    """SDXL's two CLIP text encoders with their tokenizers."""

    tokenizers: Tokenizers
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection]


_NETWORKS = {
    "unet": UNet2DConditionModel.from_config,
    "vae": AutoencoderKL.from_config,
    "text_encoder": lambda config: CLIPTextModel(CLIPTextConfig.from_dict(config)),
    "text_encoder_2": lambda config: CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config)),
}


_CONFIG_ERRORS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RuntimeError, StrictDataclassError)
"""What diffusers, transformers and torch raise for numbers that do not belong together."""


_READERS = 4
"""Threads: one alone does not fill the bus to a GPU."""


_SHOWN = 5
"""Complaints about weights that are printed; a wrong file easily gives a thousand."""


def require_fitting(base: BaseModel) -> None:
    """Compare every weight's name and shape with what the networks expect, without reading one. Raises ModelError."""
    for part in base.parts.values():
        _require_fitting(part, _shapes(_without_weights(part)))


def load_vae(base: BaseModel, device: torch.device) -> AutoencoderKL:
    """The VAE, frozen, in float32: SDXL's overflows in float16."""
    return _loaded(base.parts["vae"], device, torch.float32)


def load_text_encoders(base: BaseModel, models_dir: Path, device: torch.device, dtype: torch.dtype) -> TextEncoders:
    """Both text encoders, frozen, with their tokenizers."""
    first, second = (_loaded(base.parts[name], device, dtype) for name in ("text_encoder", "text_encoder_2"))
    return TextEncoders(load_tokenizers(base, models_dir), (first, second))


def load_unet(base: BaseModel, device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
    """The UNet, frozen."""
    return _loaded(base.parts["unet"], device, dtype)


def load_tokenizers(base: BaseModel, models_dir: Path) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """The tokenizers of the two text encoders. For a single file they are fetched once if no folder in `models_dir` has them."""
    folder = tokenizers_of(base, models_dir)
    first, second = (CLIPTokenizer.from_pretrained(folder / name, local_files_only=True) for name in TOKENIZERS)
    return first, second


def _loaded(part: Part, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """The network of `part` with its weights: frozen, in `dtype`, on `device`. Raises ModelError if they do not fit."""
    network = _without_weights(part)
    shapes = _shapes(network)
    _require_fitting(part, shapes)
    with ExitStack() as stack:
        opened = {file.path: stack.enter_context(safe_open(file.path, "pt", str(device))) for file in part.files}

        def weight(name: str) -> torch.Tensor:
            file, source = part.find(name)
            return _read(opened[file.path], source).reshape(shapes[name]).to(dtype)

        weights = dict(zip(shapes, prefetch(weight, shapes, _READERS), strict=True))
    network.load_state_dict(weights, assign=True)
    return network.to(device).requires_grad_(False).eval()


def _without_weights(part: Part) -> torch.nn.Module:
    """The network with shapes in the place of weights. Raises ModelError if its configuration makes none."""
    try:
        with shapes_only():
            return _NETWORKS[part.name](part.config)
    except _CONFIG_ERRORS as error:
        raise ModelError(f"{part.name}/config.json: no network can be made of it ({' '.join(str(error).split())})") from None


def _shapes(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in network.state_dict().items()}


def _require_fitting(part: Part, shapes: dict[str, tuple[int, ...]]) -> None:
    misfits = part.misfits(shapes)
    if misfits:
        more = [f"and {len(misfits) - _SHOWN} more"] if len(misfits) > _SHOWN else []
        raise ModelError(bullet_list(f"{part.files[0].path}: the weights of {part.name} do not fit:", [*misfits[:_SHOWN], *more]))


def _read(opened: safe_open, source: Source) -> torch.Tensor:
    """The stored tensor as the weight that it stands for."""
    if source.third is None:
        tensor = opened.get_tensor(source.key)
        return tensor.T.contiguous() if source.transposed else tensor
    rows = opened.get_slice(source.key)
    height = rows.get_shape()[0] // 3
    return rows[source.third * height : (source.third + 1) * height]
