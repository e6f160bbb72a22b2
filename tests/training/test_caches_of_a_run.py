"""What earlier runs left is verified once in each run, and a run whose images are decoded to other pixels by now says so."""

import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from color_profiles import P3, gamma_curve, rgb_profile

from common import images, output_layout
from training.callbacks import checkpoint
from training.data import cache

RUN = {"NUM_TRAIN_EPOCHS": 3, "LORA_TARGETS": "attention", "VALIDATION_FRACTION": 0.3}


@pytest.fixture
def hashed(monkeypatch) -> Counter[Path]:
    """How often each file of caches, checkpoints and LoRAs was hashed."""
    counts: Counter[Path] = Counter()

    def counting(original: Callable[[Path], object]) -> Callable[[Path], object]:
        def count(path: Path) -> object:
            counts[path] += 1
            return original(path)

        return count

    for module, name in ((cache, "is_valid_entry"), (output_layout, "data_sha256"), (checkpoint, "_digest")):
        monkeypatch.setattr(module, name, counting(getattr(module, name)))
    return counts


def test_files_are_hashed_once_and_other_pixels_are_reported(stage, hashed, monkeypatch):
    stage.add("astronaut", caption="sks, woman")
    stage.add("coffee", caption="sks, cup", icc_profile=rgb_profile(P3, gamma_curve(2.2)))
    stage.add("chelsea", caption="sks, cat")
    monkeypatch.setattr(images, "DECODER_REVISION", "1")
    assert stage.stopped(1, signal.SIGTERM, **RUN).returncode == 143
    hashed.clear()

    monkeypatch.setattr(images, "DECODER_REVISION", "2")
    resumed = stage.run(**RUN)
    assert (resumed.returncode, resumed.stderr) == (0, "")
    changed = "image decoder, and latents with it: revision 1 for 1 images -> revision 2 for 1 images"
    assert f"setting changed since the checkpoint: {changed}\n" in resumed.stdout
    assert "continuing at step" in resumed.stdout
    assert "images: 1 encoded, 2 in the cache" in resumed.stdout
    kinds = Counter(path.parent.name for path in hashed)
    assert kinds["latents"] == 3
    assert kinds["text"] >= 4
    once = {path: count for path, count in hashed.items() if "state" not in path.parts}
    assert set(once.values()) == {1}

    hashed.clear()
    finished = stage.run(**RUN)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert hashed[stage.lora] == 1
    assert set(hashed.values()) == {1}
