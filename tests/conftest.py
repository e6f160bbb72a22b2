"""What the tests share: the tiny SDXL, built once."""

import os
from pathlib import Path

import pytest

# Networks this small gain nothing from threads, which wait for each other many times longer on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")


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
