"""The memory guard: what it reads, when it acts, and a real shortage of memory with the threshold scaled to it."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial

import pytest

from training.system.device import (
    GIB,
    Memory,
    MemoryGuard,
    Thresholds,
    comfyui_advice,
    largest_other_process,
    read_memory,
    thresholds,
)

SPARK = Thresholds(reserve=16 * GIB, warn=12 * GIB, stop=8 * GIB, emergency=2 * GIB)
MEMINFO = """MemTotal:       {total} kB
MemFree:          1234 kB
MemAvailable:   {available} kB
Buffers:           100 kB
HugePages_Total:       0
"""
PRESSURE = "some avg10=99.00 avg60=1.00 avg300=0.00 total=1\nfull avg10={full} avg60=0.00 avg300=0.00 total=2\n"


class FakeProc:
    """Files like those in /proc, with figures that a test sets."""

    def __init__(self, folder):
        self.meminfo, self.pressure = folder / "meminfo", folder / "memory"

    def set(self, available_gib: float, full: str = "0.00") -> Callable[[], Memory]:
        """Set the figures, and return what reads them."""
        self.meminfo.write_text(MEMINFO.format(total=128 * 2**20, available=int(available_gib * 2**20)), encoding="ascii")
        self.pressure.write_text(PRESSURE.format(full=full), encoding="ascii")
        return partial(read_memory, self.meminfo, self.pressure)


@pytest.fixture
def proc(tmp_path):
    return FakeProc(tmp_path)


@pytest.fixture
def sent(monkeypatch):
    """The signals that the guard sends."""
    signals = []
    monkeypatch.setattr("training.system.device.os.kill", lambda process, signum: signals.append((process, signum)))
    return signals


def test_figures_come_from_meminfo_and_pressure(proc):
    read = proc.set(20.5, "3.25")
    assert read() == Memory(128 * GIB, int(20.5 * GIB), 3.25)
    proc.pressure.unlink()
    assert read().pressure == 0.0


def test_this_machine_reports_its_memory():
    memory = read_memory()
    assert 0 < memory.available <= memory.total


def test_thresholds_of_a_spark_are_16_12_8_and_2_gib():
    assert thresholds("auto", 128 * GIB, is_shared=True) == SPARK
    assert thresholds("auto", 128 * GIB, is_shared=False) is None
    assert thresholds(0.0, 128 * GIB, is_shared=True) is None
    limits = Thresholds(reserve=11 * GIB, warn=7 * GIB, stop=3 * GIB, emergency=3 * GIB // 4)
    assert thresholds(3.0, 128 * GIB, is_shared=False) == limits


def test_caches_are_freed_first_and_two_low_polls_in_a_row_stop_the_run(proc, sent, capsys):
    guard = MemoryGuard(SPARK, proc.set(13))
    guard.poll()
    assert (guard.cache_clear_requested, sent) == (False, [])
    proc.set(11)
    guard.poll()
    assert guard.cache_clear_requested
    proc.set(7)
    guard.poll()
    proc.set(9)
    guard.poll()
    proc.set(7)
    guard.poll()
    assert sent == []
    guard.poll()
    assert sent == [(os.getpid(), signal.SIGUSR1)]
    guard.poll()
    assert len(sent) == 1
    assert "saving the state and stopping (7.0 GiB available, pressure 0 %)" in capsys.readouterr().err


def test_pressure_stops_the_run_although_memory_is_available(proc, sent):
    guard = MemoryGuard(SPARK, proc.set(50, full="10.01"))
    guard.poll()
    guard.poll()
    assert len(sent) == 1


def test_the_guard_exits_at_once_when_nearly_nothing_is_available(proc, monkeypatch, sent):
    codes = []
    monkeypatch.setattr("training.system.device.os._exit", codes.append)
    MemoryGuard(SPARK, proc.set(1.9)).poll()
    assert codes == [75]


HOG = """
import sys, time
held, wanted, most = [], int(sys.argv[1]), int(sys.argv[2])
while len(held) < most:
    held.append(bytes(range(256)) * 2**19)
    if len(held) == wanted:
        print("holding", flush=True)
    time.sleep(0.005 if len(held) < wanted else 0.05)
time.sleep(600)
"""


@contextlib.contextmanager
def hogging(pieces: int, more: int = 0):
    """Another program that holds so many pieces of 128 MiB when the block starts, and then takes `more`, slowly."""
    hog = subprocess.Popen([sys.executable, "-c", HOG, str(pieces), str(pieces + more)], stdout=subprocess.PIPE)
    try:
        assert hog.stdout.readline() == b"holding\n"
        yield
    finally:
        hog.kill()
        hog.communicate()


def test_largest_process_is_the_largest_but_this_one():
    with hogging(pieces=8):
        name, size = largest_other_process()
    assert size >= GIB
    assert "(process " in name


def test_the_advice_names_every_comfyui_and_masks_logins():
    assert comfyui_advice("http://127.0.0.1:8188/").endswith(" http://127.0.0.1:8188/free")
    advice = comfyui_advice("http://127.0.0.1:9, http://me:secret@spark:8188")
    assert advice.endswith(" http://127.0.0.1:9/free http://***@spark:8188/free")
    assert "curl " in advice
    assert "secret" not in advice


@pytest.mark.long
def test_a_real_shortage_ends_the_run_with_75_and_the_next_one_resumes(stage):
    """The floor is so high that a program that takes a few GiB gets below it."""
    stage.add("astronaut")
    stage.add("coffee")
    memory = read_memory()
    floor = (memory.available - memory.total // 16) / GIB - 1.5
    long = {"NUM_TRAIN_EPOCHS": 4000, "SAVE_EVERY_EPOCHS": 0, "LORA_TARGETS": "attention", "MEMORY_FLOOR_GIB": floor}

    def take(is_over: threading.Event) -> None:
        with hogging(max(1, int((read_memory().available / GIB - floor) * 8)), more=24):  # other programs free memory meanwhile
            is_over.wait(120)

    run = stage.disturbed(1, take, **long)
    assert run.returncode == 75, run.stderr
    assert "memory guard: " in run.stderr
    assert "stopped by the memory guard" in run.stderr.splitlines()[-1]
    again = stage.stopped(stage.steps_taken() + 1, signal.SIGTERM, **long | {"MEMORY_FLOOR_GIB": 0})
    assert again.returncode == 143
    assert "continuing at step" in again.stdout
