"""Engines, losses, optimizers and adapter kinds, as a user chooses them."""

import json
import re
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

QUICK = {"NUM_TRAIN_EPOCHS": 3, "LEARNING_RATE": 0.01, "SAVE_EVERY_EPOCHS": 0}
LONG = QUICK | {"NUM_TRAIN_EPOCHS": 8}


@pytest.fixture
def images(stage):
    """The stage with two photographs."""
    for name in ("astronaut", "coffee"):
        stage.add(name)
    return stage


def losses(output: Path) -> list[float]:
    lines = (output / "lora" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize(("first", "second"), [("fast", "plain"), ("plain", "fast")])
def test_a_run_that_one_engine_began_is_continued_by_the_other(images, first, second):
    """Checkpoints do not depend on the engine; on the CPU in fp32, losses agree within 1e-4 of their size at every step."""
    images.trained(**LONG, ENGINE=first, OUTPUT_DIR=images.output.with_name("whole"))
    whole = losses(images.output.with_name("whole"))
    stopped = images.stopped(2, signal.SIGTERM, **LONG, ENGINE=first)
    assert stopped.returncode == 143
    taken = len(losses(images.output))
    assert 2 <= taken < len(whole)
    output = images.trained(**LONG, ENGINE=second)
    assert f"setting changed since the checkpoint: engine: {first} -> {second}" in output
    assert f"engine: {second} (ENGINE={second})" in output
    assert len(losses(images.output)) == len(whole)
    assert losses(images.output) == pytest.approx(whole, rel=1e-4)


def test_another_loss_is_another_run(images):
    assert "engine: fast (supports these settings)" in images.trained(**QUICK)
    first = losses(images.output)
    output = images.trained(**QUICK, LOSS="huber")
    assert "the earlier LoRA" in output
    assert losses(images.output)[0] != first[0]
    assert "nothing to do" in images.trained(**QUICK, LOSS="huber")


def test_a_dora_is_trained_by_the_plain_engine_and_has_its_scales(images):
    output = images.trained(**QUICK, LORA_TYPE="dora")
    assert "engine: plain (the fast engine does not support LORA_TYPE=dora)" in output
    tensors = load_file(images.lora)
    scales = [name for name in tensors if name.endswith(".dora_scale")]
    assert len(scales) == 722
    assert any((tensors[name] - 1).abs().max() > 1e-3 for name in scales)
    assert all(tensors[name].dtype == torch.float32 and tensors[name].shape[1] == 1 for name in scales)


def test_a_run_with_an_8_bit_base_is_continued_as_it_began(images):
    stopped = images.stopped(2, signal.SIGTERM, **LONG, BASE_QUANTIZATION="int8")
    assert stopped.returncode == 143
    output = images.trained(**LONG, BASE_QUANTIZATION="auto")
    assert "base quantization: int8 (as in the checkpoint)" in output
    assert "continuing at step" in output
    assert min(losses(images.output)[-2:]) < losses(images.output)[0]
    with safe_open(images.lora, "pt") as file:
        assert len(file.keys()) > 0


def test_masks_resolutions_and_mirror_images_resume_exactly(images):
    """A run that is stopped and continued is the whole one."""
    for name in ("astronaut", "coffee"):
        mask = Image.new("L", images.photographs[name].size)
        mask.paste("white", (0, 0, mask.width, mask.height // 2))
        mask.save(images.images / f"{name}-masklabel.png")
    views = QUICK | {"BUCKET_STEP": 32, "RESOLUTION": "64,96", "FLIP": "true", "MASK_WEIGHT": 0.05}
    other = images.output.with_name("whole")
    whole = images.trained(**views, OUTPUT_DIR=other)
    assert "masks: 2 of 2 images; what is outside a mask has weight 0.05 in the loss" in whole
    assert "2 images (4 with each resolution)" in whole
    assert images.stopped(3, signal.SIGTERM, **views).returncode == 143
    assert 3 <= len(losses(images.output)) < len(losses(other))
    assert "continuing at step" in images.trained(**views | {"RESOLUTION": "96,64"})
    assert losses(images.output) == losses(other)
    finished, expected = (load_file(root / "lora" / "sks.safetensors") for root in (images.output, other))
    assert all(torch.equal(finished[name], expected[name]) for name in expected)
    assert "resolution = [  # set by environment" in (other / "lora" / "training_config_resolved.toml").read_text()


def test_the_fast_engine_refuses_what_it_does_not_support(images):
    refused = images.run(**QUICK, ENGINE="fast", LORA_TYPE="dora")
    assert refused.returncode == 2
    problem = "ENGINE=fast: the fast engine does not support LORA_TYPE=dora; set ENGINE=auto"
    assert refused.stderr == f"train_lora: invalid settings:\n  - {problem}\n"
    assert not images.lora.exists()


def test_a_wrong_choice_is_refused_before_there_are_images(stage):
    """run.sh checks every stage before it collects for hours."""
    refused = stage.run("--settings", ENGINE="fast", LORA_TYPE="dora")
    assert "ENGINE=fast: the fast engine does not support LORA_TYPE=dora; set ENGINE=auto" in refused.stderr
    assert refused.returncode == 2
    refused = stage.run("--check=ahead", OPTIMIZER="adamw8bit")
    assert "OPTIMIZER=adamw8bit needs" in refused.stderr or "OPTIMIZER=adamw8bit: the package" in refused.stderr
    assert refused.returncode == 2


def test_prodigy_trains_and_a_stopped_run_ends_with_the_same_lora(images):
    pytest.importorskip("prodigyopt")
    settings = LONG | {"OPTIMIZER": "prodigy", "LEARNING_RATE": 1}
    output = images.trained(**settings, OUTPUT_DIR=images.output.with_name("whole"))
    assert "decoupled" not in output
    assert images.stopped(2, signal.SIGTERM, **settings).returncode == 143
    images.trained(**settings)
    whole = load_file(images.output.with_name("whole") / "lora" / images.lora.name)
    resumed = load_file(images.lora)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_prodigy_with_a_rate_for_adamw_is_refused(images):
    refused = images.run(**QUICK | {"LEARNING_RATE": 1e-4}, OPTIMIZER="prodigy")
    assert refused.returncode == 2
    assert "set LEARNING_RATE=1" in refused.stderr


def test_an_optimizer_that_cannot_be_used_is_one_line_before_anything_is_encoded(images, monkeypatch):
    monkeypatch.setattr("training.method.optimizers.importlib.util.find_spec", lambda name: None)
    for flags in ((), ("--check",)):
        refused = images.run(*flags, **QUICK, OPTIMIZER="adamw8bit")
        assert refused.returncode == 2
        assert "OPTIMIZER=adamw8bit needs the package bitsandbytes: run `pip install bitsandbytes`" in refused.stderr
        assert not (images.output / "cache" / "latents").exists()
    monkeypatch.setattr("training.method.optimizers.importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    refused = images.run(**QUICK, OPTIMIZER="adamw8bit")
    assert "OPTIMIZER=adamw8bit: the package bitsandbytes cannot be loaded (" in refused.stderr
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    refused = images.run(**QUICK, OPTIMIZER="adamw8bit")
    assert re.fullmatch(r"train_lora: OPTIMIZER=adamw8bit needs an NVIDIA GPU; set OPTIMIZER=adamw\n", refused.stderr)
