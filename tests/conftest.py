"""What all tests share: the order in which files are begun, how many at a time, and the tiny SDXL, built once."""

import gc
import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it when it is imported; no test may reach the real hub

# Networks this small gain nothing from threads, which wait for each other many times longer on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

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
"""Files that take long; begun last, one of them would keep a single core busy while the others have nothing to do."""


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Of `-n auto`: one more than there are cores, because many tests wait for a server, a process or the clock."""
    return len(os.sched_getaffinity(0)) + 1


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is there by now stays to the end: the collector of garbage need not look at it again and again, nor so often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        name = item.path.name
        return LONGEST_FIRST.index(name) if name in LONGEST_FIRST else len(LONGEST_FIRST)

    items.sort(key=place)


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory) -> Path:
    """A tiny SDXL as a diffusers folder. Read only: copy it before changing anything."""
    from demo.tiny_sdxl import build  # diffusers takes seconds to import, which most tests need not wait for

    return build(tmp_path_factory.mktemp("models") / "tiny-sdxl")


@pytest.fixture(scope="session")
def tiny_single_file(tiny_sdxl, tmp_path_factory) -> Path:
    """The same weights as one `.safetensors`, next to no tokenizer."""
    from demo.tiny_sdxl import write_single_file

    return write_single_file(tiny_sdxl, tmp_path_factory.mktemp("single") / "tiny-sdxl.safetensors")
