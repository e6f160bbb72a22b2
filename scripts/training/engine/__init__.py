"""What takes the training steps: the plain engine, or the fast one as its back end. Only this module imports the fast one."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from training.config import LoraSettings, unsupported_by_fast_engine
from training.engine.step import recomputed
from training.method.adapters import Adapter
from training.models.weights import TextEncoders

EngineName = Literal["fast", "plain"]


def choose_engine(requested: Literal["auto", "fast", "plain"], lora: LoraSettings) -> tuple[EngineName, str]:
    """The engine for a request, and the reason for it in a few words. The settings refuse "fast" where it is not supported."""
    if requested != "auto":
        return requested, f"ENGINE={requested}"
    unsupported = unsupported_by_fast_engine(lora)
    return ("plain", unsupported) if unsupported else ("fast", "supports these settings")


def warm_up(name: EngineName, device: torch.device, dtype: torch.dtype) -> None:
    """Load the libraries that the engine needs on `device`, which can be done while networks are read."""
    if name == "fast":
        from training.engine.fast.unet import warm_up_libraries

        warm_up_libraries(device, dtype)


def prepare_unet(
    name: EngineName, unet: UNet2DConditionModel, adapter: Adapter, device: torch.device, *, gradient_checkpointing: bool = False
) -> Callable[..., None]:
    """Make `unet` compute by the engine `name`: the fast one replaces its forwards.

    Returns what TrainStep calls as `sync_compute_weights`.
    """
    for weight in [*unet.parameters(), *unet.buffers()]:
        if weight.dim() == 4 and not weight.requires_grad:  # the adapter's are views of its flat weights, and must remain so
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing(partial(recomputed, is_random=adapter.dropout > 0))
    if name == "plain":
        return partial(_enable_adapter, adapter)
    from training.engine.fast.fuse import fuse
    from training.engine.fast.unet import install_fast_forwards

    groups, convolutions, sync_compute_weights = fuse(adapter)
    install_fast_forwards(unet, groups, convolutions)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the separate weights occupied is too small for the joined ones
    return sync_compute_weights


def recompute_text_encoders(encoders: TextEncoders, adapter: Adapter) -> None:
    """Make the text encoders compute the activations of their layers again in the backward."""
    for layer in (module for encoder in encoders for module in encoder.modules() if isinstance(module, CLIPEncoderLayer)):
        layer.forward = partial(recomputed, layer.forward, is_random=adapter.dropout > 0)


def _enable_adapter(adapter: Adapter, adapts: bool = True) -> None:
    """Make PEFT's layers compute with the adapter, or without it."""
    for layer in adapter.layers.values():
        if layer.disable_adapters is adapts:
            layer.enable_adapters(adapts)
