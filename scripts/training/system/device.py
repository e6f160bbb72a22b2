"""The device to train on, in which precision, and its memory: how much is available, and the guard that stops training in time.

A DGX Spark freezes when the memory that CPU and GPU share is exhausted. Docker's limits do not see what the GPU allocates, and
the driver counts the page cache as used, so the guard reads the kernel's own MemAvailable and memory pressure (PSI).
"""

import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from common.errors import MEMORY_SIGNAL, MemoryShort
from common.masking import mask_address

GIB = 2**30
AUTO_SHARE = 1 / 16
""""auto" keeps this share of the machine's memory free: 8 of a DGX Spark's 128 GiB."""
MAX_PRESSURE = 10.0
"""Per cent of the last ten seconds in which every process waited for memory."""
INTERVAL_S = 0.5
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


def release_memory() -> None:
    """Give back the memory of what is no longer used, torch's cache on the GPU included."""
    gc.collect()
    torch.cuda.empty_cache()


def limit_gpu_memory(device: torch.device, max_bytes: int) -> None:
    """Limit torch to `max_bytes` on a GPU that shares the machine's memory, so that it raises OutOfMemoryError before the machine
    freezes."""
    if device.type == "cpu" or not shares_memory(device):
        return
    total = torch.cuda.get_device_properties(device).total_memory
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_per_process_memory_fraction(min(1.0, max_bytes / total), index)


@dataclass(frozen=True)
class Memory:
    """The state of the machine's memory; sizes in bytes."""

    total: int
    available: int
    pressure: float
    """`full avg10` of PSI in per cent; 0 where the kernel does not measure it."""


def read_memory(meminfo: Path = Path("/proc/meminfo"), psi: Path = Path("/proc/pressure/memory")) -> Memory:
    """What the kernel reports in these files."""
    lines = (line.split() for line in meminfo.read_text(encoding="ascii").splitlines())
    values = {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines}
    pressure = 0.0
    with suppress(OSError):  # an older kernel, or one without PSI
        for line in psi.read_text(encoding="ascii").splitlines():
            if line.startswith("full "):
                pressure = float(line.split("avg10=")[1].split()[0])
    return Memory(values["MemTotal"], values["MemAvailable"], pressure)


@dataclass(frozen=True)
class Thresholds:
    """How much memory must be available, in bytes. On a DGX Spark: 16, 12, 8 and 2 GiB."""

    reserve: int
    """What must remain free when a run starts."""
    warn: int
    """Below it: free the caches."""
    stop: int
    """Below it in two polls in a row: save the state and stop."""
    emergency: int
    """Below it: exit at once, without waiting for the step or saving."""


def thresholds(setting_gib: float | Literal["auto"], total: int, is_shared: bool) -> Thresholds | None:
    """The thresholds for a machine with `total` bytes; None: no guard. "auto" guards only memory that GPU and CPU share."""
    if setting_gib == 0 or (setting_gib == "auto" and not is_shared):
        return None
    stop = int(AUTO_SHARE * total if setting_gib == "auto" else setting_gib * GIB)
    return Thresholds(stop + total // 16, stop + total // 32, stop, min(stop // 4, total // 64))


@contextmanager
def memory_guard(limits: Thresholds | None) -> "Iterator[MemoryGuard | None]":
    """Watch the memory in a thread while the block runs; None without `limits`.

    If the kernel has to kill a process nevertheless, it kills this one before others.
    """
    if limits is None:
        yield None
        return
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")
    guard, ended = MemoryGuard(limits), threading.Event()

    def watch() -> None:
        while not ended.wait(INTERVAL_S):
            guard.poll()

    thread = threading.Thread(target=watch, name="memory guard", daemon=True)
    thread.start()
    try:
        yield guard
    finally:
        ended.set()
        thread.join()


class MemoryGuard:
    """Acts on the available memory: below `warn` it requests empty caches, below `stop` (or under high pressure) it sends
    MEMORY_SIGNAL to its own process, and below `emergency` it exits."""

    def __init__(self, limits: Thresholds, read: Callable[[], Memory] = read_memory):
        self.cache_clear_requested = False
        """The training loop frees its caches and resets this."""
        self._limits = limits
        self._read = read
        self._low_polls = 0
        self._has_warned = False

    def poll(self) -> None:
        """Read the memory once and act on it."""
        memory = self._read()
        if memory.available < self._limits.emergency:
            _report(memory, "stopping immediately; run the same command again (without FRESH=1) to resume from the last checkpoint")
            os._exit(MemoryShort.exit_code)
        is_low = memory.available < self._limits.stop or memory.pressure > MAX_PRESSURE
        self._low_polls = self._low_polls + 1 if is_low else 0
        if self._low_polls == 2:
            _report(memory, "saving the state and stopping")
            os.kill(os.getpid(), MEMORY_SIGNAL)
        elif memory.available < self._limits.warn and not self._has_warned:
            _report(memory, "freeing caches")
            self.cache_clear_requested = self._has_warned = True


def _report(memory: Memory, action: str) -> None:
    figures = f"{memory.available / GIB:.1f} GiB available, pressure {memory.pressure:.0f} %"
    print(f"memory guard: {action} ({figures})", file=sys.stderr, flush=True)


def largest_other_process() -> tuple[str, int]:
    """Name with process id, and resident bytes, of the largest process but this one; GPU allocations are not included."""
    page, sizes = os.sysconf("SC_PAGE_SIZE"), {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):  # it has exited meanwhile
            if int(folder.name) != os.getpid():
                name = (folder / "comm").read_text().strip()
                sizes[f"{name} (process {folder.name})"] = int((folder / "statm").read_text().split()[1]) * page
    return max(sizes.items(), key=lambda item: item[1], default=("none", 0))


def comfyui_advice(endpoints: str) -> str:
    """How to make the ComfyUI servers of the setting `comfyui_endpoint` free their memory; empty without one. Logins are masked."""
    urls = " ".join(f"{each.strip().rstrip('/')}/free" for each in mask_address(endpoints).split(",") if each.strip())
    body = """'{"unload_models": true, "free_memory": true}'"""
    if not urls:
        return ""
    command = f"curl -H 'Content-Type: application/json' -d {body} {urls}"
    return f"If ComfyUI holds the memory, unload its models (add what COMFYUI_HEADERS holds with -H): {command}"
