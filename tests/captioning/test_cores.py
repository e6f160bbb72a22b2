"""Inference threads are the big cores where the cores differ."""

import pytest

from captioning.cores import inference_threads, preparing_workers


def machine(folder, *cores, siblings=1):
    """A /sys/devices/system/cpu with cores of these speeds: a capacity, or kHz if above 10000; None: the kernel says nothing."""
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


@pytest.mark.parametrize(
    ("cores", "siblings", "threads"),
    [
        ([718] * 5 + [1024] * 5 + [718] * 5 + [997] * 5, 1, 10),  # a DGX Spark
        ([2_808_000] * 10 + [3_900_000] * 9 + [4_004_000], 1, 10),
        ([5_800_000] * 8 + [4_300_000] * 16, 1, 8),
        ([5_800_000] * 2 + [4_300_000] * 2, 2, 2),  # two threads on each core count once
        ([5_250_000] * 8 + [5_700_000] * 8, 1, 0),  # nearly equal cores are equal
        ([1024] * 4, 1, 0),
        ([None] * 4, 1, 0),
        ([1024, 512, None, 512], 1, 0),
    ],
)
def test_threads_are_the_big_cores_or_left_to_the_runtime(tmp_path, cores, siblings, threads):
    assert inference_threads(machine(tmp_path, *cores, siblings=siblings), tmp_path) == threads


def test_only_cores_that_this_process_may_use_count(tmp_path):
    machine(tmp_path, 512, 512, 1024, 1024)
    assert inference_threads({0, 1, 2}, tmp_path) == 1
    assert inference_threads({0, 1}, tmp_path) == 0


def test_this_machine_has_an_answer():
    assert inference_threads() >= 0
    assert preparing_workers() >= 2
