"""Which device, which precision, and whether memory allows to keep all activations."""

import contextlib
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}
GIB = 2**30


@dataclass(frozen=True)
class Precision:
    """Where and in which dtype the frozen UNet computes; LoRA weights, noise and loss are fp32 always."""

    device: torch.device
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """As the setting `mixed_precision` calls it."""
        return next(name for name, dtype in _DTYPES.items() if dtype == self.dtype)

    @property
    def scales_loss(self) -> bool:
        """fp16's range is too small for gradients: the loss is scaled up and they are scaled down again."""
        return self.dtype == torch.float16

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context of the forward pass."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def choose_precision(mixed_precision: Literal["bf16", "fp16", "no"]) -> Precision:
    """The first NVIDIA GPU in `mixed_precision`, else the CPU in fp32."""
    if torch.cuda.is_available():
        return Precision(torch.device("cuda"), _DTYPES[mixed_precision])
    return Precision(torch.device("cpu"), torch.float32)


def make_deterministic() -> None:
    """From here on the GPU uses only algorithms that give the same bits each time; what has none is an error.

    cuBLAS reads its workspace's size from the environment when it is first used. cuDNN's attention has no such backward.
    """
    os.putenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_cudnn_sdp(False)


def wake_gpu() -> None:
    """Begin to create the GPU's context in a thread: it takes a second or two in which other modules can be imported."""

    def create() -> None:
        if torch.cuda.is_available():
            torch.empty(1, device="cuda")

    threading.Thread(target=create, daemon=True).start()


def describe(precision: Precision) -> str:
    """One phrase: the device and the dtype."""
    name = torch.cuda.get_device_name(precision.device) if precision.device.type == "cuda" else "the CPU"
    return f"{name} in {str(precision.dtype).removeprefix('torch.')}"


def available_bytes(device: torch.device) -> int:
    """Memory that a program may still take on `device`.

    Where GPU and CPU share memory, the driver counts the page cache as used; the kernel's MemAvailable does not.
    """
    if device.type == "cuda" and not torch.cuda.get_device_properties(device).is_integrated:
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def wants_checkpointing(setting: bool | Literal["auto"], batch_pixels: int, precision: Precision) -> bool:
    """Whether activations are recomputed instead of kept. "auto": yes, unless the free memory clearly holds them for a
    micro-batch of `batch_pixels` pixels."""
    if setting != "auto":
        return setting
    return step_bytes(batch_pixels) + _RESERVE_BYTES > available_bytes(precision.device)


def step_bytes(batch_pixels: int) -> int:
    """About what a step takes that keeps the activations of `batch_pixels` pixels."""
    return _STEP_BYTES + _ACTIVATION_BYTES_PER_PIXEL * batch_pixels


_STEP_BYTES = 8 * GIB
"""UNet in bf16, LoRA weights with gradients and moments at rank 32, workspaces."""
_ACTIVATION_BYTES_PER_PIXEL = 12 * 1024
"""Measured peak without checkpointing, per pixel of the micro-batch."""
_RESERVE_BYTES = 8 * GIB
