"""What the training tests share: real photographs, the tiny UNet with a LoRA, and the stage as a user runs it."""

from pathlib import Path

import pytest
import skimage.data
import torch
from PIL import Image

PHOTOGRAPHS = Path(skimage.data.__file__).parent


torch.set_num_threads(1)
"""The networks here are so small that two threads wait for each other longer than they compute, above all on a busy machine."""


@pytest.fixture(scope="session")
def photographs() -> dict[str, Image.Image]:
    """Photographs that ship with scikit-image, by name: astronaut 512x512, coffee 600x400, chelsea 451x300, rocket 640x427."""
    names = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")
    return {Path(name).stem: Image.open(PHOTOGRAPHS / name).convert("RGB") for name in names}
