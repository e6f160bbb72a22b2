"""The base model of the tests on a GPU."""

import pytest

from demo import tiny_sdxl

MEDIUM = tiny_sdxl.Size(unet=(64, 128, 256), heads=(1, 2, 4), clip_l=(64, 2, 1, 64), clip_g=(128, 2, 2, 128))


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return tiny_sdxl.build(tmp_path_factory.mktemp("models") / "medium", size=MEDIUM)
