"""Stop training before the machine runs out of the memory that CPU and GPU share.

A DGX Spark freezes when this memory is exhausted. Docker's limits do not see what the GPU allocates, and the driver counts the
page cache as used, so the guard reads the kernel's own MemAvailable and memory pressure (PSI).
"""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.errors import MEMORY_SIGNAL, MemoryShort
from common.masking import mask_address

GIB = 2**30
AUTO_SHARE = 1 / 16
""""auto" keeps this share of the machine's memory free: 8 of a DGX Spark's 128 GiB."""
MAX_PRESSURE = 10.0
"""Per cent of the last ten seconds in which every process waited for memory."""
INTERVAL_S = 0.5


@dataclass(frozen=True)
class Memory:
    """The state of the machine's memory; sizes in bytes."""

    total: int
    available: int
    pressure: float
    """`full avg10` of PSI in per cent; 0 where the kernel does not measure it."""


@dataclass(frozen=True)
class MemoryFiles:
    """The kernel's files that report on memory."""

    meminfo: Path
    pressure: Path

    def read(self) -> Memory:
        lines = (line.split() for line in self.meminfo.read_text(encoding="ascii").splitlines())
        values = {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines}
        pressure = 0.0
        with suppress(OSError):  # an older kernel, or one without PSI
            for line in self.pressure.read_text(encoding="ascii").splitlines():
                if line.startswith("full "):
                    pressure = float(line.split("avg10=")[1].split()[0])
        return Memory(values["MemTotal"], values["MemAvailable"], pressure)


PROC = MemoryFiles(Path("/proc/meminfo"), Path("/proc/pressure/memory"))


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

    def __init__(self, limits: Thresholds, files: MemoryFiles = PROC):
        self.cache_clear_requested = False
        """The training loop frees its caches and resets this."""
        self._limits = limits
        self._files = files
        self._low_polls = 0
        self._has_warned = False

    def poll(self) -> None:
        """Read the memory once and act on it."""
        memory = self._files.read()
        if memory.available < self._limits.emergency:
            _report(memory, "stopping immediately; run the same command to resume from the last checkpoint")
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
