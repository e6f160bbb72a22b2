"""The memory guard: what it reads, what it decides, and a real shortage of memory with the floor scaled to it."""

import contextlib
import http.server
import os
import signal
import subprocess
import sys
import threading

import pytest

from common.errors import ResourceError
from training.config import TrainSettings
from training.memory_budget import MemoryBudget, StepMemory, fit_to_memory, fitting_batch, resolve_batch_size, suggest_settings
from training.plan import circumstances
from training.system.memory_guard import (
    GIB,
    KERNEL,
    Memory,
    MemoryFiles,
    MemoryGuard,
    Thresholds,
    comfyui_hint,
    floors,
    largest_other_process,
)

SPARK = Thresholds(8 * GIB, 128 * GIB)
MEMINFO = """MemTotal:       {total} kB
MemFree:          1234 kB
MemAvailable:   {available} kB
Buffers:           100 kB
HugePages_Total:       0
"""
PRESSURE = "some avg10=99.00 avg60=1.00 avg300=0.00 total=1\nfull avg10={full} avg60=0.00 avg300=0.00 total=2\n"


class FakeKernel:
    """Files as those of /proc, with figures that a test sets."""

    def __init__(self, folder):
        self.files = MemoryFiles(folder / "meminfo", folder / "memory")

    def says(self, available_gib: float, full: str = "0.00") -> MemoryFiles:
        self.files.meminfo.write_text(MEMINFO.format(total=128 * 2**20, available=int(available_gib * 2**20)), encoding="ascii")
        self.files.pressure.write_text(PRESSURE.format(full=full), encoding="ascii")
        return self.files


@pytest.fixture
def kernel(tmp_path):
    return FakeKernel(tmp_path)


@pytest.fixture
def asked(monkeypatch):
    """The signals that the guard sends."""
    sent = []
    monkeypatch.setattr("training.system.memory_guard.os.kill", lambda process, signum: sent.append((process, signum)))
    return sent


def test_figures_come_from_meminfo_and_pressure(kernel):
    assert kernel.says(20.5, "3.25").read() == Memory(128 * GIB, int(20.5 * GIB), 3.25)
    kernel.files.pressure.unlink()
    assert kernel.files.read().pressure == 0.0


def test_this_machine_says_what_it_has():
    memory = KERNEL.read()
    assert 0 < memory.available <= memory.total


def test_floors_of_a_spark_are_16_12_and_8_gib():
    limits = floors("auto", 128 * GIB, is_shared=True)
    assert (limits.reserve, limits.warn, limits.stop, limits.emergency) == (16 * GIB, 12 * GIB, 8 * GIB, 2 * GIB)
    assert floors("auto", 128 * GIB, is_shared=False) is None
    assert floors(0.0, 128 * GIB, is_shared=True) is None
    assert floors(3.0, 128 * GIB, is_shared=False) == Thresholds(3 * GIB, 128 * GIB)


def test_caches_first_then_the_end_after_two_looks(kernel, asked, capsys):
    watch = MemoryGuard(SPARK, kernel.says(13))
    watch.look()
    assert (watch.wants_empty_caches, asked) == (False, [])
    kernel.says(11)
    watch.look()
    assert watch.wants_empty_caches
    kernel.says(7)
    watch.look()
    kernel.says(9)
    watch.look()
    kernel.says(7)
    watch.look()
    assert asked == []
    watch.look()
    assert asked == [(os.getpid(), signal.SIGUSR1)]
    watch.look()
    assert len(asked) == 1
    assert "7.0 GiB of memory are available" in capsys.readouterr().err


def test_pressure_ends_the_run_although_memory_seems_free(kernel, asked):
    watch = MemoryGuard(SPARK, kernel.says(50, full="10.01"))
    watch.look()
    watch.look()
    assert len(asked) == 1


def test_no_time_is_lost_when_nearly_nothing_is_left(kernel, monkeypatch, asked):
    codes = []
    monkeypatch.setattr("training.system.memory_guard.os._exit", codes.append)
    MemoryGuard(SPARK, kernel.says(1.9)).look()
    assert codes == [75]


SIZE = StepMemory(fixed=10 * GIB, per_pixel=1024, per_pixel_checkpointed=256)
MEGAPIXELS = 4 * 2**20
"""4 GiB per image, 1 GiB with checkpointing."""


def with_run(batch: int, accumulation: int = 1, checkpointing="auto") -> TrainSettings:
    from dataclasses import replace

    plain = TrainSettings()
    run = replace(plain.run, train_batch_size=batch, gradient_accumulation_steps=accumulation)
    return replace(plain, run=run, model=replace(plain.model, gradient_checkpointing=checkpointing))


def room_of(available_gib: int) -> MemoryBudget:
    return MemoryBudget(SIZE, MEGAPIXELS, available_gib * GIB, SPARK)


def decided(settings: TrainSettings, available_gib: int) -> tuple[int, int, bool]:
    settings = fit_to_memory(settings, room_of(available_gib), lambda: "; hint")
    return settings.run.train_batch_size, settings.run.gradient_accumulation_steps, settings.model.gradient_checkpointing


def test_batch_becomes_what_fits_and_accumulation_makes_up_for_it(capsys):
    assert decided(with_run(4), 42) == (4, 1, False)
    assert capsys.readouterr().out == ""
    assert decided(with_run(4), 41) == (4, 1, True)
    assert decided(with_run(6), 31) == (3, 2, True)
    said = capsys.readouterr().out
    assert said.startswith("batch size 6 needs about 16.0 GiB of memory; 31.0 GiB are available, of which 16.0 stay in reserve")
    assert said.endswith(": it is 3 now\n")
    assert decided(with_run(5, 3), 30) == (3, 5, True)
    assert decided(with_run(4, checkpointing=False), 31) == (1, 4, False)


def test_what_does_not_fit_at_all_is_refused_with_every_figure():
    with pytest.raises(ResourceError) as refused:
        decided(with_run(4), 26)
    for words in ("11.0 GiB of memory at batch size 1", "26.0 GiB are available", "16.0 stay in reserve", "; hint", "(process "):
        assert words in str(refused.value)


@pytest.mark.parametrize(
    ("available", "most", "checkpointing", "batch"),
    [
        (42, 100, "auto", 4),  # 16 GiB in reserve, 10 for what is always there
        (50, 100, "auto", 6),
        (50, 5, "auto", 5),
        (41, 100, "auto", 15),  # 3 would fit with activations kept
        (35, 2, "auto", 2),
        (41, 100, False, 3),
        (50, 100, True, 24),
        (20, 100, "auto", 1),
    ],
)
def test_auto_is_the_largest_batch_that_fits(available, most, checkpointing, batch, capsys):
    settings = resolve_batch_size(with_run("auto", 3, checkpointing), room_of(available), most)
    assert (settings.run.train_batch_size, settings.run.gradient_accumulation_steps) == (batch, 3)
    assert capsys.readouterr().out.startswith(f"batch size {batch}: the largest for {max(0, available - 16)}.0 GiB and {most} ")


def test_auto_goes_on_with_the_steps_of_the_saved_run():
    for available, (batch, accumulation) in {50: (6, 2), 45: (4, 3), 41: (12, 1), 28: (2, 6)}.items():
        run = resolve_batch_size(with_run("auto"), room_of(available), 100, samples=12).run
        assert (run.train_batch_size, run.gradient_accumulation_steps) == (batch, accumulation)
    assert resolve_batch_size(with_run(7), room_of(50), 100, samples=12) == with_run(7)


def test_full_gpu_is_answered_with_what_fits():
    assert suggest_settings(with_run(4, checkpointing=False), room_of(0), 14 * GIB) == "set GRADIENT_CHECKPOINTING=true"
    answer = suggest_settings(with_run(8, checkpointing=True), room_of(0), 14 * GIB)
    assert answer == "set GRADIENT_CHECKPOINTING=true TRAIN_BATCH_SIZE=4 GRADIENT_ACCUMULATION_STEPS=2, which fits"
    assert "lower RESOLUTION" in suggest_settings(with_run(8, checkpointing=True), room_of(0), 9 * GIB)
    assert fitting_batch(7, 8, lambda batch: batch, 100) == 4


def test_another_batch_in_the_same_step_may_change_between_stop_and_resume():
    assert {"train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"} <= circumstances(TrainSettings()).keys()


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
    """Another program that takes so many pieces of 128 MiB, and has them when the block begins; then it takes `more`, slowly."""
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


class ComfyUI(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/system_stats" else 404)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_comfyui_is_named_if_it_answers(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), ComfyUI) as server:
        threading.Thread(target=server.serve_forever).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert f"{address}/free" in comfyui_hint(address + "/")
        with_login = comfyui_hint("http://127.0.0.1:9, " + address.replace("//", "//me:secret@"))
        assert "/free" in with_login
        assert "secret" not in with_login
        server.shutdown()
    assert comfyui_hint(address) == ""


def test_a_real_shortage_ends_the_run_with_75_and_the_next_one_goes_on(stage):
    """The floor lies so high that a program that takes a few GiB gets below it."""
    stage.add("astronaut")
    stage.add("coffee")
    memory = KERNEL.read()
    floor = (memory.available - memory.total // 16) / GIB - 1.5
    long = {"NUM_TRAIN_EPOCHS": 4000, "SAVE_EVERY_EPOCHS": 0, "LORA_TARGETS": "attention", "MEMORY_FLOOR_GIB": floor}

    def take(is_over: threading.Event) -> None:
        with hogging(max(1, int((KERNEL.read().available / GIB - floor) * 8)), more=24):  # other programs give memory back
            is_over.wait(120)

    run = stage.disturbed(1, take, **long)
    assert run.returncode == 75, run.stderr
    assert "memory guard: " in run.stderr
    assert "stopped by the memory guard" in run.stderr.splitlines()[-1]
    again = stage.stopped(stage.steps_taken() + 1, signal.SIGTERM, **long | {"MEMORY_FLOOR_GIB": 0})
    assert again.returncode == 143
    assert "continuing at step" in again.stdout
