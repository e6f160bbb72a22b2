"""Sample images: what is rendered, that it equals diffusers' own pipeline, and that training is the same with and without them."""

import contextlib
import json
import os
import re
import shutil
import signal
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file

from training.callbacks.renderer import Renderer, initial_noise, scheduler_of
from training.callbacks.sample_prompts import SamplePrompt
from training.callbacks.sample_record import generation_parameters
from training.config import LoraSettings, TrainSettings
from training.engine import prepare_unet
from training.engine.step import TrainStep
from training.method.adapters import at_strength, inject
from training.method.diffusion import LossConfig, alphas_cumprod
from training.method.optimizers import OPTIMIZERS
from training.models.base_model import find_base
from training.models.sdxl import Schedule
from training.models.weights import load_unet, load_vae, write_tensors
from training.system.device import Precision

CPU = torch.device("cpu")
EPSILON = Schedule()
RUN = {"SAMPLES": "true", "SAMPLE_STEPS": 2, "SAVE_EVERY_EPOCHS": 1, "LORA_TARGETS": "attention", "LEARNING_RATE": 0.01}


def add_images(stage) -> None:
    stage.add("astronaut", caption="sks, 1girl, smile, orange suit")
    stage.add("coffee", "coffee.jpg", caption="sks, cup, table")


@dataclass(frozen=True)
class Sampled:
    """A finished run of two epochs with sample images. Read only."""

    stage: object
    output: str
    files: dict[str, bytes]


@pytest.fixture(scope="module")
def sampled(shared_stage) -> Sampled:
    stage = shared_stage("sampled")
    add_images(stage)
    return Sampled(stage, stage.trained(**RUN), stage.files())


def pixels(folder) -> dict[str, bytes]:
    """The pixels of every image in the folder."""
    found = {}
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            found[path.name] = image.tobytes()
    return found


def tensors_of_loras(stage) -> dict[str, dict[str, bytes]]:
    loras = sorted((stage.output / "lora").glob("*.safetensors"))
    return {path.name: {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()} for path in loras}


def test_base_model_and_every_save_are_rendered(sampled):
    folder = sampled.stage.output / "samples" / "sks"
    record = json.loads((folder / "samples.json").read_text())
    line = r"^sample images: 6 prompts x 5 \(base model, 2 LoRAs, and one of them at 2 lower strengths\), 64x64, 2 steps: about \d+ % "
    assert re.search(line, sampled.output, re.MULTILINE)
    assert [(prompt["text"], prompt["seed"], prompt["kind"]) for prompt in record["prompts"]] == [
        ("sks", 0, "trigger"),
        ("sks", 1, "trigger"),
        ("sks", 2, "trigger"),
        ("sks, standing on a beach at sunset", 3, "scene"),
        ("sks, in a snowy forest", 4, "scene"),
        ("1girl", 5, "class"),
    ]
    assert [(row["label"], row["file"], row["step"]) for row in record["rows"]] == [
        ("base model", None, 0),
        ("after epoch 1", "sks-000001.safetensors", 1),
        ("final", "sks.safetensors", 2),
    ]
    assert [(row["strength"], row["file"], row["images"][0]) for row in record["strengths"]] == [
        (0.6, "sks.safetensors", "000002-0.6-01.png"),
        (0.8, "sks.safetensors", "000002-0.8-01.png"),
        (1.0, "sks.safetensors", "000002-01.png"),
    ]
    found = pixels(folder)
    assert set(found) == {image for row in record["rows"] + record["strengths"] for image in row["images"]}
    assert len(set(found.values())) == len(found) == 30  # each LoRA, strength, prompt and seed gives another image
    latents = {f".latents/00000{epochs}-06.safetensors" for epochs in range(3)}
    prefix = "samples/sks/"
    assert {name.removeprefix(prefix) for name in sampled.files if name.startswith(prefix)} == {*found, "samples.json", *latents}
    for name, lora in (("000001-06.png", "sks-000001:1"), ("000002-0.6-06.png", "sks:0.6")):
        with Image.open(folder / name) as image:
            shown = image.info["parameters"]
        assert shown.startswith(f"1girl <lora:{lora}>\nSteps: 2, Sampler: Euler, CFG scale: 6, Seed: 5, Size: 64x64, Model: ")


def test_without_likeness_and_validation_the_last_file_is_recommended(sampled):
    record = json.loads((sampled.stage.output / "samples" / "sks" / "samples.json").read_text())
    reason = "It is the last one; nothing could be compared: there is no validation loss, and no likeness (FACE_MODEL=off)."
    assert record["recommended"] == {"file": "sks.safetensors", "strength": 1.0, "reason": reason}
    assert (record["floor"], record["ceiling"]) == (None, None)
    for row in record["rows"]:
        assert (row["likeness"], row["unscored"]) == ([None] * 6, [""] * 6)
    assert f"recommended: sks.safetensors at strength 1. {reason}" in sampled.output.splitlines()


def test_training_is_the_same_with_and_without(sampled, stage):
    add_images(stage)
    stage.trained(**RUN | {"SAMPLES": "false"})
    assert tensors_of_loras(stage) == tensors_of_loras(sampled.stage)
    assert stage.files()["lora/metrics.jsonl"] == sampled.files["lora/metrics.jsonl"]
    assert not (stage.output / "samples").exists()


def test_a_run_that_is_stopped_has_the_same_images(sampled, stage):
    """Stopped within each row: the base model's, that of the first epoch, the last, and that of a lower strength."""
    add_images(stage)
    folder = stage.output / "samples" / "sks"

    def stopped_at(images: int) -> int:
        def disturb(is_over) -> None:
            while len(list(folder.glob("*.png"))) < images and not is_over.wait(0.005):
                pass
            os.kill(os.getpid(), signal.SIGTERM)

        return stage.disturbed(0, disturb, **RUN).returncode

    for images in (1, 9, 15, 20):
        assert stopped_at(images) == 143
        assert not stage.lora.exists()
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    assert 20 <= len(times) < 30
    assert "continuing at step 2" in stage.trained(**RUN)
    images = {name: content for name, content in sampled.files.items() if name.startswith("samples/")}
    assert {name: content for name, content in stage.files().items() if name.startswith("samples/")} == images
    for name, time in times.items():
        assert (folder / name).stat().st_mtime_ns == time  # what was complete is not rendered again
    assert tensors_of_loras(stage) == tensors_of_loras(sampled.stage)


def test_a_finished_run_renders_nothing_and_a_new_one_archives_its_images(sampled, stage):
    shutil.copytree(sampled.stage.dataset, stage.dataset, dirs_exist_ok=True)
    shutil.copytree(sampled.stage.output, stage.output)
    before = stage.files()
    assert "nothing to do" in stage.trained(**RUN | {"SAMPLE_SEED": 7})
    assert stage.files() == before
    stage.trained(**RUN | {"LORA_RANK": 3, "SAMPLES": "false"})
    (archive,) = (stage.output / "lora" / "archive").iterdir()
    assert pixels(archive / "samples") == pixels(sampled.stage.output / "samples" / "sks")
    assert not (stage.output / "samples" / "sks").exists()


def test_a_run_that_is_extended_keeps_its_rows(sampled, stage):
    shutil.copytree(sampled.stage.dataset, stage.dataset, dirs_exist_ok=True)
    shutil.copytree(sampled.stage.output, stage.output)
    folder = stage.output / "samples" / "sks"
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    stage.trained(**RUN | {"NUM_TRAIN_EPOCHS": 3})
    record = json.loads((folder / "samples.json").read_text())
    rows = record["rows"]
    assert [(row["label"], row["file"]) for row in rows] == [
        ("base model", None),
        ("after epoch 1", "sks-000001.safetensors"),
        ("after epoch 2", None),  # it was the end, whose LoRA is in the archive
        ("final", "sks.safetensors"),
    ]
    assert [row["images"][0] for row in record["strengths"]] == ["000003-0.6-01.png", "000003-0.8-01.png", "000003-01.png"]
    assert set(pixels(folder)) == {image for row in rows + record["strengths"] for image in row["images"]}
    for image in (*rows[0]["images"], *rows[1]["images"]):
        assert (folder / image).stat().st_mtime_ns == times[image]
    before = pixels(sampled.stage.output / "samples" / "sks")
    again = pixels(folder)
    assert {name: again[name] for row in rows[:3] for name in row["images"]} == {
        name: image for name, image in before.items() if len(name) == len("000002-01.png")
    }


@pytest.fixture(scope="module")
def trained_network(tiny_sdxl):
    """`trained_network(schedule, kind, engine)`: a step whose LoRA is not zero, and the base model."""
    base = find_base(str(tiny_sdxl), tiny_sdxl.parent)

    def make(schedule: Schedule = EPSILON, kind: str = "lora", engine: str = "plain") -> tuple[TrainStep, object]:
        unet = load_unet(base, CPU, torch.float32)
        adapter = inject(unet, LoraSettings(lora_rank=4, lora_type=kind), seed=0)
        with torch.no_grad():
            adapter.weights.add_(0.05 * torch.randn(adapter.weights.shape, generator=torch.Generator().manual_seed(1)))
        sync = prepare_unet(engine, unet, adapter, CPU)
        config = LossConfig(schedule.prediction_type, alphas_cumprod(schedule).float(), 0.0, 0.0, 0.13025)
        optimizer = OPTIMIZERS["adamw"](adapter.weights, TrainSettings().optimizer)
        return TrainStep(unet, adapter, optimizer, config, Precision(CPU, torch.float32), 1.0, sync_compute_weights=sync), base

    return make


PROMPT = SamplePrompt("a cat", "user", "blurry", 128, 64, seed=5, guidance=4.0, steps=2)


def assert_same(latents: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """The random UNet multiplies rounding errors."""
    assert torch.linalg.vector_norm(latents - expected) < tolerance * torch.linalg.vector_norm(expected)


@pytest.fixture
def renderer_of(trained_network, tmp_path):
    """`renderer_of(...)`: a renderer of a LoRA, and what it was made of; the embeddings are random."""
    drawn = torch.Generator().manual_seed(2)
    files = {}
    for text in (PROMPT.text, PROMPT.negative):
        files[text] = tmp_path / f"{text}.safetensors"
        hidden, pooled = (torch.randn(shape, generator=drawn) for shape in ((1, 77, 96), (1, 64)))
        write_tensors(files[text], {"hidden": hidden, "pooled": pooled})

    def make(schedule: Schedule = EPSILON, **how) -> tuple[Renderer, dict]:
        step, base = trained_network(schedule, **how)
        vae = load_vae(base, CPU)
        return Renderer(step, schedule, files, vae, tiled=False), {"step": step, "vae": vae, "files": files}

    return make


SCHEDULES = {
    "epsilon": EPSILON,
    "v-prediction": Schedule(prediction_type="v_prediction"),
    "zero terminal SNR": Schedule(prediction_type="v_prediction", zero_terminal_snr=True),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_image_is_that_of_diffusers_pipeline(renderer_of, schedule):
    renderer, parts = renderer_of(schedule)
    embeddings = {text: load_file(path) for text, path in parts["files"].items()}
    pipeline = StableDiffusionXLPipeline(parts["vae"], None, None, None, None, parts["step"].unet, scheduler_of(schedule))
    pipeline.set_progress_bar_config(disable=True)
    how = {
        "prompt_embeds": embeddings["a cat"]["hidden"],
        "pooled_prompt_embeds": embeddings["a cat"]["pooled"],
        "negative_prompt_embeds": embeddings["blurry"]["hidden"],
        "negative_pooled_prompt_embeds": embeddings["blurry"]["pooled"],
    }
    how |= {"width": 128, "height": 64, "num_inference_steps": 2, "guidance_scale": 4.0, "latents": initial_noise(PROMPT)}
    with torch.no_grad():
        expected = pipeline(**how, output_type="latent").images
        image = pipeline(**how).images[0]
    assert_same(renderer.latents(PROMPT), expected, 1e-4)
    difference = np.abs(np.asarray(renderer(PROMPT), dtype=int) - np.asarray(image, dtype=int))
    assert difference.max() <= 1
    assert renderer(PROMPT).size == (128, 64)


def test_a_schedule_with_zero_terminal_snr_begins_at_pure_noise():
    for schedule, first in ((SCHEDULES["zero terminal SNR"], 999), (SCHEDULES["epsilon"], 951)):
        scheduler = scheduler_of(schedule)
        scheduler.set_timesteps(20)
        assert int(scheduler.timesteps[0]) == first
        torch.testing.assert_close(scheduler.alphas_cumprod[:-1].double(), alphas_cumprod(schedule)[:-1], rtol=1e-4, atol=1e-6)


def test_the_fast_engine_renders_what_the_plain_one_does(renderer_of):
    plain, fast = (renderer_of(engine=engine)[0].latents(PROMPT) for engine in ("plain", "fast"))
    assert_same(fast, plain, 1e-3)


@pytest.mark.parametrize(("kind", "engine"), [("lora", "plain"), ("lora", "fast"), ("dora", "plain")])
def test_strength_0_is_the_base_model_and_the_weights_are_restored(renderer_of, trained_network, kind, engine):
    renderer, parts = renderer_of(kind=kind, engine=engine)
    adapter = parts["step"].adapter
    before = adapter.weights.detach().clone()
    with_lora = renderer.latents(PROMPT)
    with at_strength(adapter, 0):
        without = renderer.latents(PROMPT)
    with contextlib.suppress(KeyError), at_strength(adapter, 0.5):
        raise KeyError
    assert torch.equal(adapter.weights, before)
    assert torch.equal(renderer.latents(PROMPT), with_lora)

    parts["step"].unet = load_unet(trained_network()[1], CPU, torch.float32)
    expected = renderer.latents(PROMPT)
    assert_same(without, expected, 1e-3)
    with pytest.raises(AssertionError):
        assert_same(with_lora, expected, 0.1)


def test_tiles_give_nearly_the_same_image(renderer_of):
    renderer, parts = renderer_of()
    whole = np.asarray(renderer(PROMPT), dtype=int)
    tiled = Renderer(parts["step"], EPSILON, parts["files"], parts["vae"], tiled=True)
    parts["vae"].tile_sample_min_size, parts["vae"].tile_latent_min_size = 64, 8
    image = np.asarray(tiled(PROMPT), dtype=int)
    assert image.shape == whole.shape
    assert np.abs(image - whole).mean() < 16


def test_generation_parameters_are_those_of_a1111():
    assert generation_parameters(PROMPT, "sdxl, v1", "sks-000005.safetensors") == (
        "a cat <lora:sks-000005:1>\nNegative prompt: blurry\n"
        'Steps: 2, Sampler: Euler, CFG scale: 4, Seed: 5, Size: 128x64, Model: "sdxl, v1", Version: LoRACat 2.0.0'
    )
    assert generation_parameters(SamplePrompt("x\ny", "user", "", 64, 64, 0, 1, 1), "base", None).startswith("x\ny\nSteps: 1, ")
