"""Shared by all tests: the order of the files, the number of workers, and the tiny SDXL, which is built once."""

import gc
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it when it is imported; no test may reach the real hub

# Such small networks gain nothing from threads, which spend their time waiting for each other on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# `make test`: the same examples each time. `make fuzz`: new ones, and those that failed before.
UNCHECKED = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
settings.register_profile("test", max_examples=15, derandomize=True, database=None, deadline=None, suppress_health_check=UNCHECKED)
settings.register_profile("fuzz", max_examples=500, print_blob=True, deadline=None, suppress_health_check=UNCHECKED)
settings.load_profile("test")

LONGEST_FIRST = (
    "test_pipeline.py",
    "test_kill.py",
    "test_train_lora.py",
    "test_distributed.py",
    "test_memory_guard.py",
    "test_fast_unet.py",
    "test_export.py",
    "test_caption_images.py",
    "test_collect_images.py",
)
"""Files that take long: started last, one of them would keep a single core busy while the others are idle."""


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """`-n auto`: one more than there are cores, because many tests wait for a server, a process or the clock."""
    return len(os.sched_getaffinity(0)) + 1


def pytest_collection_finish(session: pytest.Session) -> None:
    """Exclude what is imported by now from garbage collection, and collect less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def position(item: pytest.Item) -> int:
        name = item.path.name
        return LONGEST_FIRST.index(name) if name in LONGEST_FIRST else len(LONGEST_FIRST)

    items.sort(key=position)


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory) -> Path:
    """A tiny SDXL as a diffusers folder. Read only: copy it before changing anything."""
    from demo.tiny_sdxl import build  # imports diffusers, which takes seconds and most tests do not need

    return build(tmp_path_factory.mktemp("models") / "tiny-sdxl")


@pytest.fixture(scope="session")
def tiny_single_file(tiny_sdxl, tmp_path_factory) -> Path:
    """The same weights as one `.safetensors`, without a tokenizer beside it."""
    from demo.tiny_sdxl import write_single_file

    return write_single_file(tiny_sdxl, tmp_path_factory.mktemp("single") / "tiny-sdxl.safetensors")
