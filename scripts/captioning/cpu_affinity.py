"""Which of the machine's cores are worth an inference thread.

A matrix product that is split evenly over fast and slow cores waits for the slow ones. On a DGX Spark, 10 of the 20 cores
are fast; the others decode and prepare images meanwhile.
"""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CPU_FOLDER = Path("/sys/devices/system/cpu")


BIG_FROM = 0.8
"""Cores with at least this share of the fastest one's capacity are big ones: firmware gives equal cores slightly different tops."""


MOST_WORKERS = 8


def big_cores(cpus: set[int] | None = None, folder: Path = CPU_FOLDER) -> list[set[int]]:
    """The big cores if the cores differ, else none; each core as the numbers of its hardware threads.

    `cpus` are the numbers of those this process may run on; None asks the system.
    """
    cpus = os.sched_getaffinity(0) if cpus is None else cpus
    capacities = {cpu: _capacity(folder / f"cpu{cpu}") for cpu in cpus}
    if not cpus or None in capacities.values():
        return []
    big = [cpu for cpu, capacity in capacities.items() if capacity >= BIG_FROM * max(capacities.values())]
    if len(big) == len(cpus):
        return []
    cores: dict[tuple[int, int], set[int]] = {}
    for cpu in sorted(big):
        cores.setdefault(_core(folder / f"cpu{cpu}", cpu), set()).add(cpu)
    return list(cores.values())


@contextmanager
def kept_on(cpus: set[int]) -> Iterator[None]:
    """Keep the calling thread, and no other one, on `cpus` meanwhile; an empty set leaves it alone.

    A system that refuses makes it slower, and nothing worse.
    """
    if not cpus:
        yield
        return
    before = os.sched_getaffinity(0)
    with suppress(OSError):
        os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        with suppress(OSError):
            os.sched_setaffinity(0, before)


def preparing_workers() -> int:
    """Threads that decode and prepare images during inference."""
    cpus = len(os.sched_getaffinity(0))
    return max(2, min(MOST_WORKERS, cpus - (len(big_cores()) or cpus)))


def is_arm() -> bool:
    """Whether ONNX Runtime's bfloat16 fast path can matter at all."""
    return platform.machine().lower() in ("aarch64", "arm64")


def _capacity(cpu: Path) -> int | None:
    """The kernel's measure of a core's speed, where it has one (ARM), or its highest frequency in kHz."""
    return _number(cpu / "cpu_capacity") or _number(cpu / "cpufreq" / "cpuinfo_max_freq")


def _core(cpu: Path, number: int) -> tuple[int, int]:
    """What two hardware threads of one core have in common."""
    core, package = _number(cpu / "topology" / "core_id"), _number(cpu / "topology" / "physical_package_id")
    return (number, -1) if core is None else (core, package or 0)


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
