"""Weights: from `.safetensors` files straight into networks on the device, which diffusers and transformers build; and back.

Files are written with the mode and the errors that all other files have.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from common.background import prefetch
from common.clip_tokens import TOKENIZERS, raising_value_error
from common.errors import ModelError, bullet_list
from common.files import atomic_write
from training.models.base_model import find_or_download_tokenizers
from training.models.int8 import quantize
from training.models.sdxl import PREFIXES, TEXT_ENCODERS, BaseModel, Component

TextEncoders = tuple[CLIPTextModel, CLIPTextModelWithProjection]

_NETWORKS = {
    "unet": UNet2DConditionModel.from_config,
    "vae": AutoencoderKL.from_config,
    "text_encoder": lambda config: CLIPTextModel(CLIPTextConfig.from_dict(config)),
    "text_encoder_2": lambda config: CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config)),
}

_FROM_SINGLE_FILE = {
    "unet": lambda tensors, network: convert_ldm_unet_checkpoint(tensors, network.config),
    "vae": lambda tensors, network: convert_ldm_vae_checkpoint(tensors, network.config),
    "text_encoder": lambda tensors, _: convert_ldm_clip_checkpoint(tensors),
    "text_encoder_2": lambda tensors, network: convert_open_clip_checkpoint(network, tensors, PREFIXES["text_encoder_2"]),
}
"""diffusers' conversions from the original (sgm) layout. They rename tensors, and split or transpose a few, on any device."""

_OLD_VAE_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Attention layers in VAEs that early versions of diffusers wrote."""

_CONFIG_ERRORS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RuntimeError, StrictDataclassError)
"""What diffusers, transformers and torch raise for an inconsistent configuration."""

_READERS = 4
"""Threads: one alone does not fill the bus to a GPU."""

_MAX_SHOWN = 5
"""Mismatches that are printed; a wrong file easily has a thousand."""


def load_unet(base: BaseModel, device: torch.device, dtype: torch.dtype, *, in_int8: bool = False) -> UNet2DConditionModel:
    """The UNet, frozen. `in_int8`: most of its weights are held in 8 bits."""
    if not in_int8:
        return _load(base.components["unet"], device, dtype)
    unet = _load(base.components["unet"], torch.device("cpu"), dtype)
    quantize(unet, device)
    return unet


def networks_without_weights(base: BaseModel, *, text_encoders: bool = False) -> list[torch.nn.Module]:
    """The UNet, and both text encoders if these are asked for, with shapes in place of weights. Raises ModelError if the weights in
    the files do not match."""
    return [_matching_network(base.components[name]) for name in ("unet", *(TEXT_ENCODERS if text_encoders else ()))]


def load_vae(base: BaseModel, device: torch.device) -> AutoencoderKL:
    """The VAE, frozen, in float32: SDXL's overflows in float16."""
    return _load(base.components["vae"], device, torch.float32)


def load_text_encoders(base: BaseModel, device: torch.device, dtype: torch.dtype) -> TextEncoders:
    """SDXL's two CLIP text encoders, frozen."""
    first, second = (_load(base.components[name], device, dtype) for name in TEXT_ENCODERS)
    return first, second


def load_tokenizers(base: BaseModel, models_dir: Path) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """The tokenizers of the two text encoders; see `find_or_download_tokenizers` for those of a single file."""
    folder = find_or_download_tokenizers(base, models_dir)
    encoders = (base.components[name] for name in TEXT_ENCODERS)
    first, second = (_load_tokenizer(folder / name, encoder) for name, encoder in zip(TOKENIZERS, encoders, strict=True))
    return first, second


def _load_tokenizer(folder: Path, encoder: Component) -> CLIPTokenizer:
    """The tokenizer in `folder`. Raises ModelError if it is damaged, or has tokens that the text encoder does not know."""
    try:
        for path in folder.iterdir():
            if not (path.is_file() or path.is_dir()):  # reading a pipe may never end
                raise ValueError(f"{path.name} is not a regular file")
        with raising_value_error():
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
        if not all(0 <= number < encoder.config["vocab_size"] for number in [*special, *tokenizer.get_vocab().values()]):
            raise ValueError(f"it has tokens that the {encoder.label} does not know")
        return tokenizer
    except (*_CONFIG_ERRORS, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{folder}: this tokenizer is damaged ({type(error).__name__}: {reason}): download it again") from None


def require_matching_weights(base: BaseModel) -> None:
    """Compare every weight's name and shape with the networks, without reading a weight. Raises ModelError."""
    for component in base.components.values():
        _matching_network(component)


def require_finite_weights(base: BaseModel, names: Sequence[str], dtype: torch.dtype) -> None:
    """Search the weights of these components for NaN and infinity, as they are in `dtype`. Raises ModelError with file and tensor.

    Reads all of them: for the case that something computed with them is not finite.
    """
    for component in (base.components[name] for name in names):
        with _opened(component, torch.device("cpu")) as where:
            for key, file in where.items():
                weight = file.get_tensor(key)
                if weight.isfinite().all() and not weight.to(dtype).isfinite().all():
                    raise ModelError(
                        f"{component.file_of(key)}: {key} of the {component.label} is too large for {str(dtype)[6:]}; set "
                        "MIXED_PRECISION=bf16, or use another base model"
                    )
                if not weight.isfinite().all():
                    raise ModelError(
                        f"{component.file_of(key)}: {key} of the {component.label} holds NaN or infinity: the file is damaged, or "
                        "the result of a bad merge; download it again, or use another base model"
                    )


@contextlib.contextmanager
def _opened(component: Component, device: torch.device) -> Iterator[dict[str, safe_open]]:
    """The name of each of the component's tensors, and its opened file. Raises ModelError if safetensors refuses a file."""
    with ExitStack() as stack:
        opened = {}
        for path in {file.path for file in component.files}:
            try:
                opened[path] = stack.enter_context(safe_open(path, "pt", str(device)))
            except SafetensorError as error:
                raise ModelError(f"{path}: {' '.join(str(error).split())}: download it again") from None
        yield {key: opened[file.path] for file in component.files for key in file.tensors if key in component.tensors}


def _load(component: Component, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """The network of `component` with its weights: frozen, in `dtype`, on `device`."""
    network = _matching_network(component)
    with _opened(component, device) as where:
        read = prefetch(lambda key: where[key].get_tensor(key).to(dtype), where, _READERS)
        tensors = dict(zip(where, read, strict=True))
    network.load_state_dict(_state_dict(component, tensors, network), assign=True)
    return network.to(device).requires_grad_(False).eval()


def _matching_network(component: Component) -> torch.nn.Module:
    """The network of `component` with shapes in place of weights. Raises ModelError if the configuration is not valid, or the
    weights in the files do not match it."""
    try:
        with shapes_only():
            network = _NETWORKS[component.name](component.config)
    except _CONFIG_ERRORS as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{component.name}/config.json: this configuration does not make a network ({reason})") from None
    if component.name == "unet" and not component.config.get("addition_time_embed_dim"):
        raise ModelError("unet/config.json: addition_time_embed_dim is missing: without it the UNet cannot read an image's size")
    stored = {key: torch.empty(tensor.shape, device="meta") for key, tensor in component.tensors.items()}
    _state_dict(component, stored, network)
    return network


def _state_dict(component: Component, tensors: dict[str, torch.Tensor], network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """`tensors` of the component's files as the state dict of `network`. Raises ModelError for missing weights and shapes."""
    # CLIPTextModel lost its `text_model.` in transformers 5.6; files with and without it exist.
    found = {name.removeprefix("text_model."): tensor for name, tensor in _diffusers_names(component, tensors, network).items()}
    weights, missing, mismatches = {}, [], []
    for name, expected in network.state_dict().items():
        tensor = found.get(name.removeprefix("text_model."))
        if tensor is None:
            missing.append(f"{name} is missing")
            continue
        if set(tensor.shape[expected.ndim :]) == {1}:  # a linear layer that is stored as a 1x1 convolution
            tensor = tensor.reshape(tensor.shape[: expected.ndim])
        if tensor.shape != expected.shape:
            mismatches.append(f"{name} has the shape {tuple(tensor.shape)} instead of {tuple(expected.shape)}")
        weights[name] = tensor
    if problems := missing + mismatches:
        more = [f"and {len(problems) - _MAX_SHOWN} more"] if len(problems) > _MAX_SHOWN else []
        title = f"{component.files[0].path}: the weights of {component.name} do not match its configuration:"
        raise ModelError(bullet_list(title, [*problems[:_MAX_SHOWN], *more]))
    return weights


def _diffusers_names(component: Component, tensors: dict[str, torch.Tensor], network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """`tensors` under the names that diffusers and transformers give them."""
    if component.has_original_names:
        try:
            converted = _FROM_SINGLE_FILE[component.name](tensors, network)
        except KeyError as error:
            raise ModelError(f"{component.files[0].path}: {component.name}: {error.args[0]} is missing") from None
        untransposed = tensors.get(f"{PREFIXES[component.name]}text_projection.weight")
        return converted if untransposed is None else converted | {"text_projection.weight": untransposed}
    if component.in_single_file:
        tensors = {key.removeprefix(PREFIXES[component.name]): tensor for key, tensor in tensors.items()}
    if component.name == "vae":
        for old, new in _OLD_VAE_NAMES.items():
            tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    return tensors


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Modules that are created in this block are on the meta device; only buffers that no file holds are real.

    Nothing global is patched: another thread may create or load another network at the same time.
    """
    with torch.device("meta"), _SkipInit():
        yield


class _SkipInit(TorchFunctionMode):
    """Weights are not initialised: for tensors without memory that would take seconds, and import torch's compiler. Positions,
    which no file holds, are counted on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        if function is torch.arange:
            kwargs = {"device": "cpu"} | kwargs
        return function(*args, **kwargs)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write contiguous `tensors` on the CPU to `path`, atomically. Raises OSError if the disk refuses."""
    with atomic_write(path) as temporary:
        write_into(temporary, tensors, metadata)


def write_into(file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write `tensors` into the existing `file`, whose mode is kept. Raises OSError if the disk refuses.

    safetensors writes a temporary file that only this user may read and renames it; its own error hides the errno.
    """
    mode = file.stat().st_mode
    try:
        save_file(tensors, file, metadata)
    except SafetensorError as error:
        cause = re.search(r"os error (\d+)", str(error))
        if cause is None:
            raise
        raise OSError(int(cause[1]), os.strerror(int(cause[1])), str(file.parent)) from None
    file.chmod(mode)
