"""Which device, which precision, and how much memory a step takes there."""

import math
import os
import threading
from dataclasses import dataclass
from typing import Literal

import torch

from training.memory import KERNEL
from training.parts import Part

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


def choose_precision(mixed_precision: Literal["bf16", "fp16", "no"], gpu: int | None = None) -> Precision:
    """The NVIDIA GPU of that number, or the first one, in `mixed_precision`; without one the CPU in fp32."""
    if torch.cuda.is_available():
        return Precision(gpu_device(gpu), _DTYPES[mixed_precision])
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


def gpu_device(gpu: int | None) -> torch.device:
    """The GPU of that number; None: the current one."""
    return torch.device("cuda") if gpu is None else torch.device("cuda", gpu)


def wake_gpu(gpu: int | None) -> None:
    """Begin to create the GPU's context in a thread: it takes a second or two in which other modules can be imported."""

    def create() -> None:
        if torch.cuda.is_available():
            torch.empty(1, device=gpu_device(gpu))

    threading.Thread(target=create, daemon=True).start()


def describe(precision: Precision) -> str:
    """One phrase: the device and the dtype."""
    name = torch.cuda.get_device_name(precision.device) if precision.device.type == "cuda" else "the CPU"
    return f"{name} in {str(precision.dtype).removeprefix('torch.')}"


def shares_memory(device: torch.device) -> bool:
    """Whether `device` computes in the machine's own memory: a CPU, or a GPU without memory of its own."""
    return device.type == "cpu" or bool(torch.cuda.get_device_properties(device).is_integrated)


def available_bytes(device: torch.device) -> int:
    """Memory that a program may still take on `device`.

    Where GPU and CPU share memory, the driver counts the page cache as used; the kernel's MemAvailable does not.
    """
    return KERNEL.read().available if shares_memory(device) else torch.cuda.mem_get_info(device)[0]


def limit_gpu_memory(device: torch.device, bytes_left: int) -> None:
    """On a GPU that shares the machine's memory: let torch take so many bytes and no more, so that it says "out of memory"
    before the machine freezes."""
    if device.type == "cuda" and shares_memory(device):
        total = torch.cuda.get_device_properties(device).total_memory
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.set_per_process_memory_fraction(min(1.0, bytes_left / total), index)


@dataclass(frozen=True)
class StepMemory:
    """About what a step takes, in bytes: a part that is always there, and one per pixel of the micro-batch."""

    fixed: int
    per_pixel: int
    per_pixel_checkpointed: int

    def needed(self, batch_pixels: int, *, checkpointing: bool) -> int:
        """For a micro-batch of so many pixels, with activations recomputed or kept."""
        return self.fixed + batch_pixels * (self.per_pixel_checkpointed if checkpointing else self.per_pixel)


def step_memory(unet: Part, rank: int, precision: Precision) -> StepMemory:
    """From the sizes of the UNet's weights: they themselves; LoRA weights, gradients and two moments in fp32 and a working
    copy; workspaces; and activations, which grow with the UNet's width."""
    shapes = {name: tensor.shape for name, tensor in unet.tensors.items()}
    itemsize = precision.dtype.itemsize
    linears = [shape for name, shape in shapes.items() if "transformer_blocks" in name and len(shape) == 2]
    lora = rank * sum(sum(shape) for shape in linears) * (16 + itemsize)
    weights = itemsize * sum(math.prod(shape) for shape in shapes.values())
    workspaces = _GPU_WORKSPACE_BYTES if precision.device.type == "cuda" else _CPU_WORKSPACE_BYTES
    scale = itemsize / 2 * unet.config["block_out_channels"][0] / _SDXL_WIDTH
    kept, recomputed = (int(scale * per_pixel) for per_pixel in (_ACTIVATION_BYTES_PER_PIXEL, _CHECKPOINTED_BYTES_PER_PIXEL))
    return StepMemory(weights + lora + workspaces, kept, recomputed)


_SDXL_WIDTH = 320
_ACTIVATION_BYTES_PER_PIXEL = 5632
"""Of SDXL in bf16, per pixel of the micro-batch: a step of batch 4 at 1024 x 1024 reserved 28.7 GiB on an H100."""
_CHECKPOINTED_BYTES_PER_PIXEL = 1024
"""The same with checkpointing: 10.9 GiB."""
_GPU_WORKSPACE_BYTES = GIB * 3 // 2
_CPU_WORKSPACE_BYTES = GIB // 4
GPU_RESERVE_BYTES = 8 * GIB
"""Of a GPU's own memory, when "auto" decides whether activations are kept."""
