"""Guard of the memory that CPU and GPU share, or that a CPU run has for itself: sized before loading, memory_guard while training.

On a DGX Spark the machine freezes when this memory runs out; no limit of Docker's sees what the GPU takes, and the
driver counts the page cache as used. So everything goes by the kernel's own MemAvailable and pressure (PSI).
"""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import requests

from common.errors import MEMORY_SIGNAL
from common.settings import without_logins

GIB = 2**30


FULL_PRESSURE = 10.0
"""Per cent of the last ten seconds in which every process waited for memory."""


INTERVAL_S = 0.5


AUTO_FLOOR = 1 / 16
"""Of the machine's memory: 8 of a DGX Spark's 128 GiB."""


@dataclass(frozen=True)
class Memory:
    """What the kernel says about memory, in bytes."""

    total: int
    available: int
    pressure: float
    """`full avg10` of PSI in per cent; 0 where the kernel does not measure it."""


@dataclass(frozen=True)
class MemoryFiles:
    """Where the kernel says it."""

    meminfo: Path = Path("/proc/meminfo")
    pressure: Path = Path("/proc/pressure/memory")

    def read(self) -> Memory:
        lines = (line.split() for line in self.meminfo.read_text(encoding="ascii").splitlines())
        values = {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines}
        return Memory(values["MemTotal"], values["MemAvailable"], self._full_pressure())

    def _full_pressure(self) -> float:
        with suppress(OSError):  # an older kernel, or one without PSI
            for line in self.pressure.read_text(encoding="ascii").splitlines():
                if line.startswith("full "):
                    return float(line.split("avg10=")[1].split()[0])
        return 0.0


KERNEL = MemoryFiles()


@dataclass(frozen=True)
class Thresholds:
    """How much memory must be available, in bytes; on a DGX Spark 16, 12, 8 and 2 GiB."""

    stop: int
    """Below it, twice in a row, the state is saved and the run ends."""
    total: int
    """What the machine has."""

    @property
    def reserve(self) -> int:
        """Must be left over when a run begins."""
        return self.stop + self.total // 16

    @property
    def warn(self) -> int:
        """Below it caches are emptied."""
        return self.stop + self.total // 32

    @property
    def emergency(self) -> int:
        """Below it there is no time to wait for the step: the process ends at once, and the last saved state counts."""
        return min(self.stop // 4, self.total // 64)


def floors(setting_gib: float | Literal["auto"], total: int, is_shared: bool) -> Thresholds | None:
    """The floors for a machine of `total` bytes; None: no guard. "auto" guards memory that `is_shared` by GPU and CPU."""
    if setting_gib == "auto":
        return Thresholds(int(AUTO_FLOOR * total), total) if is_shared else None
    return Thresholds(int(setting_gib * GIB), total) if setting_gib > 0 else None


def largest_other_process() -> tuple[str, int]:
    """Name and process id, and resident bytes, of the largest process but this one; a GPU's allocations are not in it."""
    page, sizes = os.sysconf("SC_PAGE_SIZE"), {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):  # it has ended meanwhile
            if int(folder.name) != os.getpid():
                name = (folder / "comm").read_text().strip()
                sizes[f"{name} (process {folder.name})"] = int((folder / "statm").read_text().split()[1]) * page
    return max(sizes.items(), key=lambda item: item[1], default=("none", 0))


def comfyui_hint(addresses: str) -> str:
    """How the first ComfyUI among `addresses`, separated by commas, that answers gives its memory back; else nothing."""
    body = """'{"unload_models": true, "free_memory": true}'"""
    for address in addresses.split(","):
        server = address.strip().rstrip("/")
        with suppress(requests.RequestException):
            if requests.get(f"{server}/system_stats", timeout=2).ok:
                shown = without_logins(server)
                return f"; ComfyUI unloads its models on: curl -H 'Content-Type: application/json' -d {body} {shown}/free"
    return ""


class MemoryGuard:
    """A thread that watches the memory. Below the first floor it asks for caches to be emptied, below the second it sends
    MEMORY_SIGNAL to its own process, and far below it ends the process."""

    def __init__(self, limits: Thresholds, files: MemoryFiles = KERNEL):
        self._limits = limits
        self._files = files
        self._low = 0
        self._has_warned = False
        self.wants_empty_caches = False

    def look(self) -> None:
        """Look once, and act."""
        memory = self._files.read()
        figures = f"{memory.available / GIB:.1f} GiB of memory are available, pressure {memory.pressure:.0f} %"
        if memory.available < self._limits.emergency:
            print(
                f"memory guard: {figures}: the end, at once; the state saved last is whole, run again", file=sys.stderr, flush=True
            )
            os._exit(75)
        is_low = memory.available < self._limits.stop or memory.pressure > FULL_PRESSURE
        self._low = self._low + 1 if is_low else 0
        if self._low == 2:
            print(f"memory guard: {figures}: the state is saved and the run ends", file=sys.stderr, flush=True)
            os.kill(os.getpid(), MEMORY_SIGNAL)
        elif memory.available < self._limits.warn and not self._has_warned:
            print(f"memory guard: {figures}: caches are emptied", file=sys.stderr, flush=True)
            self.wants_empty_caches = self._has_warned = True

    def run(self, ended: threading.Event) -> None:
        """Look every INTERVAL_S until `ended`."""
        while not ended.wait(INTERVAL_S):
            self.look()


@contextmanager
def memory_guard(limits: Thresholds | None) -> Iterator["MemoryGuard | None"]:
    """Watch the memory while the block runs; yields the MemoryGuard, or None without `limits`.

    If the kernel has to kill a process for memory, it takes this one before others."""
    if limits is None:
        yield None
        return
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")
    watch, ended = MemoryGuard(limits), threading.Event()
    thread = threading.Thread(target=watch.run, args=(ended,), name="memory guard", daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        ended.set()
        thread.join()
