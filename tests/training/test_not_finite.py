"""NaN and infinity are found where they arise: the base model's file and the tensor are named, and nothing of them is cached."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from base_models import CPU
from safetensors.torch import load_file, save_file

from common.errors import ModelError
from training.data.batches import Batch
from training.data.cache import NotFiniteError, write_embeddings
from training.engine.step import StepResult
from training.first_step import checking_first_step
from training.models.base_model import find_base
from training.models.weights import require_finite_weights

NAN, INFINITY = float("nan"), float("inf")
BROKEN = [
    ("UNet", "model.diffusion_model.middle_block.1.proj_in.weight", NAN, {"latents", "text"}),
    ("VAE", "first_stage_model.encoder.conv_in.bias", INFINITY, {"text"}),
    (
        "text encoder CLIP-L",
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
        -INFINITY,
        {"latents"},
    ),
    ("text encoder CLIP-G", "conditioner.embedders.1.model.text_projection", NAN, {"latents"}),
]
"""A network, one of its weights, and what may be cached because it does not depend on it."""


@pytest.mark.parametrize(("label", "key", "value", "cached"), BROKEN, ids=[label for label, *_ in BROKEN])
def test_weights_that_are_not_finite_are_named_and_not_cached(stage, tiny_single_file, tiny_sdxl, label, key, value, cached):
    stage.add("coffee")
    weights = load_file(tiny_single_file)
    weights[key] = torch.full_like(weights[key], value)
    save_file(weights, stage.models / "merged.safetensors")
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(tiny_sdxl / name, stage.models / "tokenizers" / name)
    ended = stage.run(BASE_MODEL="merged.safetensors")
    assert ended.returncode == 5
    assert f"merged.safetensors: {key} of the {label} holds NaN or infinity" in ended.stderr
    assert "LEARNING_RATE" not in ended.stderr
    folders = {path.parent.name for path in (stage.output / "cache").glob("*/*.safetensors")}
    assert folders <= cached
    assert not stage.lora.exists()


@pytest.mark.parametrize(
    ("key", "code"), [("first_stage_model.decoder.conv_out.bias", 0), ("model.diffusion_model.middle_block.1.proj_in.weight", 5)]
)
def test_sample_images_that_are_not_finite_are_left_out_and_never_the_failure(stage, tiny_single_file, tiny_sdxl, key, code):
    """A decoder is not needed for training; for the UNet, the first step has the better message."""
    stage.add("coffee")
    weights = load_file(tiny_single_file)
    weights[key] = torch.full_like(weights[key], NAN)
    save_file(weights, stage.models / "merged.safetensors")
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(tiny_sdxl / name, stage.models / "tokenizers" / name)
    once = {"NUM_TRAIN_EPOCHS": 1, "LORA_TARGETS": "attention", "SAMPLE_STEPS": 1}
    ended = stage.run(BASE_MODEL="merged.safetensors", SAMPLES="true", **once)
    assert ended.returncode == code
    assert ended.stdout.count("sample images: none from here on (the UNet or the VAE returns NaN or infinity)") == 1
    assert stage.lora.exists() == (code == 0)
    assert not (stage.output / "samples").exists()


def test_a_weight_that_fp16_cannot_hold_names_the_setting(tiny_single_file, tmp_path):
    weights = load_file(tiny_single_file)
    key = "model.diffusion_model.out.2.bias"
    weights[key] = torch.full(weights[key].shape, 1e6)
    save_file(weights, tmp_path / "large.safetensors")
    base = find_base("large", tmp_path)
    require_finite_weights(base, ["unet"], torch.bfloat16)
    with pytest.raises(
        ModelError, match=rf"large.safetensors: {key} of the UNet is too large for float16; set MIXED_PRECISION=bf16"
    ):
        require_finite_weights(base, ["unet"], torch.float16)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (NAN, "the text encoders return NaN or infinity for the caption 'sks, cup'"),
        (1e6, "'sks, cup' are too large for fp16"),
    ],
)
def test_embeddings_that_are_not_finite_are_not_written(tmp_path, value, message):
    def encode(texts):
        return torch.full((1, 77, 8), value), torch.zeros(1, 5)

    file = tmp_path / "text" / "caption.safetensors"
    with pytest.raises(NotFiniteError, match=message):
        list(write_embeddings([(file, ["sks, cup"])], encode, torch.float16, workers=1))
    assert not file.exists()


def batch(**values: torch.Tensor) -> Batch:
    zeros = dict.fromkeys(Batch.__dataclass_fields__, torch.zeros(1, 1))
    return Batch(**zeros | values)


def test_embeddings_of_an_earlier_version_are_named_as_the_cause(tmp_path):
    job = SimpleNamespace(outputs=SimpleNamespace(cache=tmp_path / "cache"))
    begin = checking_first_step(job, lambda batches, rate: lambda: StepResult(NAN, 1.0, diverged=True))
    read = begin([batch(hidden=torch.full((1, 1), NAN))], 1e-4)
    with pytest.raises(ModelError, match=r"cache: holds NaN or infinity.*delete its folders text and latents"):
        read()
    later = begin([batch()], 1e-4)()
    assert later.diverged  # the loop reports it


def test_a_gradient_that_fp16_skips_is_not_reported(tmp_path):
    skipped = StepResult(0.5, INFINITY, skipped=True)
    begin = checking_first_step(SimpleNamespace(), lambda batches, rate: lambda: skipped)
    assert begin([batch()], 1e-4)() is skipped


def test_finite_weights_whose_prediction_is_not_finite(tiny_sdxl, tmp_path):
    base = find_base(str(tiny_sdxl), tmp_path)
    precision = SimpleNamespace(dtype=torch.float16, device=CPU)
    job = SimpleNamespace(outputs=SimpleNamespace(cache=tmp_path), base=base, precision=precision)
    begin = checking_first_step(job, lambda batches, rate: lambda: StepResult(INFINITY, 1.0, skipped=True))
    with pytest.raises(ModelError, match=r"the UNet's first prediction is NaN or infinity.*set MIXED_PRECISION=bf16"):
        begin([batch()], 1e-4)()
