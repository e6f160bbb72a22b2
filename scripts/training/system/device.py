"""Which device, which precision, and how much memory a step takes there."""

import os
import threading
from dataclasses import dataclass
from typing import Literal

import torch

from training.system.memory_guard import KERNEL

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
