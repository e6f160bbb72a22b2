"""The device to train on: which one, in which precision, and how much of its memory is available."""

import os
import threading
from dataclasses import dataclass
from typing import Literal

import torch

from training.system.memory_guard import read_memory

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}


@dataclass(frozen=True)
class Precision:
    """The device and dtype of the frozen UNet's computations. LoRA weights, noise and loss are always fp32."""

    device: torch.device
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The dtype as the setting `mixed_precision` names it."""
        return next(name for name, dtype in _DTYPES.items() if dtype == self.dtype)

    @property
    def scales_loss(self) -> bool:
        """Whether the loss is scaled, because gradients would underflow in fp16."""
        return self.dtype == torch.float16


def choose_precision(mixed_precision: Literal["bf16", "fp16", "no"], gpu: int | None = None) -> Precision:
    """The GPU with index `gpu` (None: the current one) in `mixed_precision`; without a GPU the CPU in fp32."""
    if torch.cuda.is_available():
        device = torch.device("cuda") if gpu is None else torch.device("cuda", gpu)
        return Precision(device, _DTYPES[mixed_precision])
    return Precision(torch.device("cpu"), torch.float32)


def describe(precision: Precision) -> str:
    """The device's name and the dtype, such as "NVIDIA GB10 in bfloat16"."""
    name = torch.cuda.get_device_name(precision.device) if precision.device.type == "cuda" else "the CPU"
    return f"{name} in {str(precision.dtype).removeprefix('torch.')}"


def wake_gpu(gpu: int | None) -> None:
    """Create the GPU's context in a thread. It takes a second or two, in which the caller can import other modules."""

    def create() -> None:
        if torch.cuda.is_available():
            torch.empty(1, device="cuda" if gpu is None else gpu)

    threading.Thread(target=create, daemon=True).start()


def make_deterministic() -> None:
    """Use only algorithms that give the same bits each time; an operation without one raises RuntimeError.

    Call it before the first computation: cuBLAS reads its workspace size from the environment when it is initialized.
    """
    os.putenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's attention has no deterministic backward


def shares_memory(device: torch.device) -> bool:
    """Whether `device` uses the machine's main memory: a CPU, or an integrated GPU such as GB10."""
    return device.type == "cpu" or bool(torch.cuda.get_device_properties(device).is_integrated)


def available_bytes(device: torch.device) -> int:
    """How much memory a program can still allocate on `device`.

    Where GPU and CPU share memory, the driver counts the page cache as used; the kernel's MemAvailable does not.
    """
    return read_memory().available if shares_memory(device) else torch.cuda.mem_get_info(device)[0]


def limit_gpu_memory(device: torch.device, max_bytes: int) -> None:
    """Limit torch to `max_bytes` on a GPU that shares the machine's memory, so that it raises OutOfMemoryError before the machine
    freezes."""
    if device.type == "cpu" or not shares_memory(device):
        return
    total = torch.cuda.get_device_properties(device).total_memory
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_per_process_memory_fraction(min(1.0, max_bytes / total), index)
