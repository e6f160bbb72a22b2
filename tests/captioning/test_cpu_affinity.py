"""Where cores differ in speed, inference threads are pinned to the performance cores."""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest

from captioning import wd14
from captioning.cpu_affinity import decode_workers, performance_cores, pinned_to
from captioning.wd14 import Tagger, open_session


def machine(folder, *cores, siblings=1):
    """A /sys/devices/system/cpu with cores of these speeds: a capacity, or kHz if above 10000; None: not reported."""
    for core, speed in enumerate(cores):
        for thread in range(siblings):
            cpu = folder / f"cpu{core * siblings + thread}"
            (cpu / "topology").mkdir(parents=True)
            (cpu / "topology" / "core_id").write_text(f"{core}\n")
            (cpu / "topology" / "physical_package_id").write_text("0\n")
            if speed and speed < 10_000:
                (cpu / "cpu_capacity").write_text(f"{speed}\n")
            elif speed:
                (cpu / "cpufreq").mkdir()
                (cpu / "cpufreq" / "cpuinfo_max_freq").write_text(f"{speed}\n")
    return set(range(len(cores) * siblings))


SPARK = [718] * 5 + [1024] * 5 + [718] * 5 + [997] * 5


@pytest.mark.parametrize(
    ("speeds", "siblings", "expected"),
    [
        (SPARK, 1, [{cpu} for cpu in (5, 6, 7, 8, 9, 15, 16, 17, 18, 19)]),
        ([2_808_000] * 10 + [3_900_000] * 9 + [4_004_000], 1, [{cpu} for cpu in range(10, 20)]),
        ([5_800_000] * 8 + [4_300_000] * 16, 1, [{cpu} for cpu in range(8)]),
        ([5_800_000] * 2 + [4_300_000] * 2, 2, [{0, 1}, {2, 3}]),  # two threads on each core count once
        ([5_250_000] * 8 + [5_700_000] * 8, 1, []),  # nearly equal cores are equal
        ([1024] * 4, 1, []),
        ([None] * 4, 1, []),
        ([1024, 512, None, 512], 1, []),
    ],
)
def test_performance_cores_are_those_that_are_faster_than_the_rest(tmp_path, speeds, siblings, expected):
    assert performance_cores(machine(tmp_path, *speeds, siblings=siblings), tmp_path) == expected


def test_only_cores_that_this_process_may_use_count(tmp_path, monkeypatch):
    machine(tmp_path, 512, 512, 1024, 1024)
    assert performance_cores({0, 1, 2}, tmp_path) == [{2}]
    assert performance_cores({0, 1}, tmp_path) == []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3})
    assert performance_cores(folder=tmp_path) == [{3}]


def test_this_machine_is_supported():
    big = performance_cores()
    assert set().union(*big) < os.sched_getaffinity(0)  # none if all are equal
    assert big or decode_workers() == 2


def on_unequal_cores(monkeypatch, folder: Path) -> list[int]:
    """Pretend that all cores of this machine are performance cores, beside a slow one; returns their numbers."""
    here = sorted(os.sched_getaffinity(0))
    machine(folder, *[1024] * (here[-1] + 1), 512)
    monkeypatch.setattr(wd14, "performance_cores", lambda: performance_cores({*here, here[-1] + 1}, folder))
    return here


def options_of(options: onnxruntime.SessionOptions) -> tuple[int, str | None]:
    """Number of threads and the processors that they are pinned to, None: any."""
    try:
        where = options.get_session_config_entry("session.intra_op_thread_affinities")
    except RuntimeError:  # no such entry
        where = None
    return options.intra_op_num_threads, where


@pytest.fixture
def session_options(monkeypatch):
    """Number of threads and pinning of each session that is opened."""
    recorded, open_one = [], onnxruntime.InferenceSession

    def record(model, options, providers):
        recorded.append(options_of(options))
        return open_one(model, options, providers=providers)

    monkeypatch.setattr(onnxruntime, "InferenceSession", record)
    return recorded


def tagger_of(folder: Path, threads: int | None = None) -> Tagger:
    return Tagger(folder / "model.onnx", folder / "selected_tags.csv", 2, threads=threads)


def test_each_thread_but_the_callers_is_pinned_to_a_performance_core_counted_from_one(tmp_path, monkeypatch):
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda _model, options, providers: options)

    def options_on(folder, *speeds, siblings=1):
        return options_of(open_session(Path(), "cpu", cores=performance_cores(machine(folder, *speeds, siblings=siblings), folder)))

    assert options_on(tmp_path / "spark", *SPARK) == (10, "7;8;9;10;16;17;18;19;20")
    assert options_on(tmp_path / "hybrid", 1024, 1024, 512, siblings=2) == (2, "3,4")
    assert options_on(tmp_path / "one_big", 512, 1024) == (1, None)
    assert options_on(tmp_path / "equal", 1024, 1024) == (0, None)


def test_threads_run_on_performance_cores_and_probabilities_stay_the_same(tmp_path, monkeypatch, tiny, session_options):
    cpus = on_unequal_cores(monkeypatch, tmp_path)
    batch = np.random.default_rng(0).uniform(0, 255, (2, 448, 448, 3)).astype(np.float32)
    expected = tagger_of(tiny, threads=len(cpus)).run_session(batch)[0]
    others = set(os.listdir("/proc/self/task"))
    pinned = tagger_of(tiny)
    assert (pinned.run_session(batch)[0] == expected).all()
    threads = set(os.listdir("/proc/self/task")) - others
    expected_cpus = [{cpu} for cpu in cpus[1:]]
    deadline = time.monotonic() + 10  # a thread is pinned when it starts, which may be later
    while (found := sorted(map(os.sched_getaffinity, map(int, threads)), key=min)) != expected_cpus and time.monotonic() < deadline:
        time.sleep(0.01)
    assert found == expected_cpus
    assert [number for number, _ in session_options] == [len(cpus)] * 2


def test_calling_thread_is_on_the_first_performance_core_while_the_model_runs(tmp_path, monkeypatch, tiny):
    first, *_ = cpus = on_unequal_cores(monkeypatch, tmp_path)
    pinned = tagger_of(tiny)
    monkeypatch.setattr(pinned, "_session", SimpleNamespace(run=lambda *_: [os.sched_getaffinity(0)]))
    assert pinned.run_session(np.zeros(1))[0] == {first}
    assert os.sched_getaffinity(0) == set(cpus)
    with pinned_to({1023}):  # there is no such core
        assert os.sched_getaffinity(0) == set(cpus)


def test_threads_are_not_pinned_on_equal_cores_or_with_a_given_number_of_threads(tmp_path, monkeypatch, tiny, session_options):
    on_unequal_cores(monkeypatch, tmp_path / "unequal")
    few = tagger_of(tiny, threads=2)
    cpus = machine(tmp_path / "equal", 1024, 1024)
    monkeypatch.setattr(wd14, "performance_cores", lambda: performance_cores(cpus, tmp_path / "equal"))
    equal = tagger_of(tiny)
    assert session_options == [(2, None), (0, None)]
    for free in (few, equal):
        monkeypatch.setattr(free, "_session", SimpleNamespace(run=lambda *_: [os.sched_getaffinity(0)]))
        assert free.run_session(np.zeros(1))[0] == os.sched_getaffinity(0)
