"""What takes the training steps: the plain engine, or the fast one as its back end. Only this module imports the fast one."""

from collections.abc import Callable
from typing import Literal

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from training.config import LoraSettings, unsupported_by_fast_engine
from training.engine.step import TrainStep, enable_gradient_checkpointing
from training.method.adapters import Adapter
from training.method.diffusion import LossConfig
from training.method.optimizers import Optimizer
from training.system.device import Precision

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


def build_engine(
    name: EngineName,
    unet: UNet2DConditionModel,
    adapter: Adapter,
    optimizer: Optimizer,
    config: LossConfig,
    precision: Precision,
    max_grad_norm: float,
    all_reduce: Callable[[torch.Tensor], None] | None = None,
    *,
    gradient_checkpointing: bool = False,
    captures: bool = True,
) -> TrainStep:
    """The engine `name` that trains `adapter` in `unet`; the forwards of `unet` may be replaced."""
    sync = lambda: None  # noqa: E731
    if name == "fast":
        from training.engine.fast.lora_linear import fuse
        from training.engine.fast.unet import fast_ops, install_fast_forwards

        fused = fuse(adapter)
        install_fast_forwards(unet, fused, fast_ops(precision.device))
        sync = fused.sync_compute_weights
    else:
        unet.to(memory_format=torch.channels_last)
    if gradient_checkpointing:
        enable_gradient_checkpointing(unet)
    return TrainStep(
        unet, adapter, optimizer, config, precision, max_grad_norm, all_reduce, sync_compute_weights=sync, captures=captures
    )
