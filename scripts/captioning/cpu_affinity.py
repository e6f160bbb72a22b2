"""Which of the machine's cores run inference threads, and pinning threads to them.

A matrix product that is split evenly over fast and slow cores waits for the slow ones. On a DGX Spark, 10 of the 20 cores
are fast: they run the model, and the others decode images meanwhile.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CPU_FOLDER = Path("/sys/devices/system/cpu")
MIN_PERFORMANCE_SHARE = 0.8
"""Cores with at least this share of the fastest one's speed are performance cores: equal cores report slightly different speeds."""
MAX_DECODE_WORKERS = 8


def performance_cores(cpus: set[int] | None = None, folder: Path = CPU_FOLDER) -> list[set[int]]:
    """The performance cores, each as the numbers of its hardware threads; [] if all cores are equal.

    `cpus` are the numbers of the CPUs to choose from, by default those that this process may use.
    """
    cpus = os.sched_getaffinity(0) if cpus is None else cpus
    speeds = {}
    for cpu in cpus:
        # The kernel's measure of a core's speed, where it has one (ARM), or the highest frequency in kHz.
        about = folder / f"cpu{cpu}"
        speeds[cpu] = _read_number(about / "cpu_capacity") or _read_number(about / "cpufreq" / "cpuinfo_max_freq")
    if not cpus or None in speeds.values():
        return []
    fast = [cpu for cpu, speed in speeds.items() if speed >= MIN_PERFORMANCE_SHARE * max(speeds.values())]
    if len(fast) == len(cpus):
        return []
    cores: dict[tuple[int, int], set[int]] = {}
    for cpu in sorted(fast):
        topology = folder / f"cpu{cpu}" / "topology"
        core, package = _read_number(topology / "core_id"), _read_number(topology / "physical_package_id")
        cores.setdefault((cpu, -1) if core is None else (core, package or 0), set()).add(cpu)
    return list(cores.values())


@contextmanager
def pinned_to(cpus: set[int]) -> Iterator[None]:
    """Pin the calling thread to `cpus` within the block; an empty set changes nothing.

    If the system refuses, the thread runs unpinned, which is only slower.
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


def decode_workers() -> int:
    """Number of threads that decode images during inference: the cores that do not run it, from 2 to MAX_DECODE_WORKERS."""
    cpus = len(os.sched_getaffinity(0))
    return max(2, min(MAX_DECODE_WORKERS, cpus - (len(performance_cores()) or cpus)))


def _read_number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
