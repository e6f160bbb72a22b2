"""Sample images: what is rendered, that it equals diffusers' own pipeline, that training is the same with and without them, and
which LoRA is recommended. What stands for dlib is in `standin_dlib`: the likeness of two images is that of their mean colors."""

import contextlib
import json
import os
import re
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file

from common.weights import data_sha256, read_header
from training.callbacks.recommendation import Save, choose, lowest_strength
from training.callbacks.renderer import Renderer, initial_noise, scheduler_of
from training.callbacks.sample_prompts import SamplePrompt
from training.callbacks.sample_record import generation_parameters
from training.config import LoraSettings, TrainSettings
from training.engine import prepare_unet
from training.engine.step import TrainStep
from training.method.adapters import at_strength, inject
from training.method.diffusion import LossConfig, alphas_cumprod
from training.method.export import is_lora_of, load_lora, write_lora
from training.method.optimizers import OPTIMIZERS
from training.models.base_model import find_base
from training.models.sdxl import Schedule
from training.models.weights import load_unet, load_vae, write_tensors
from training.system.device import Precision

CPU = torch.device("cpu")
EPSILON = Schedule()
RUN = {"SAMPLES": "true", "SAMPLE_STEPS": 2, "SAMPLE_EVERY_EPOCHS": 1, "SAVE_EVERY_EPOCHS": 1}
RUN |= {"LORA_TARGETS": "attention", "LEARNING_RATE": 0.01}
SCORED = RUN | {"FACE_MODEL": "dlib", "PYTHONPATH": Path(__file__).parents[1] / "standin_dlib"}


def add_images(stage) -> None:
    stage.add("astronaut", caption="sks, 1girl, smile, orange suit")
    stage.add("coffee", "coffee.jpg", caption="sks, cup, table")
    stage.add("rocket", caption="sks, rocket, night")
    stage.add("chelsea", caption="sks, cat")


@dataclass(frozen=True)
class Sampled:
    """A finished run of two epochs with sample images and their likeness. Read only."""

    stage: object
    output: str
    files: dict[str, bytes]


@pytest.fixture(scope="module")
def sampled(shared_stage) -> Sampled:
    stage = shared_stage("sampled")
    add_images(stage)
    return Sampled(stage, stage.trained(**SCORED), stage.files())


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
    line = (
        r"^sample images: 6 prompts x 5 \(base model, 2 LoRAs, and one of them at 2 lower strengths\), 64x64, 2 steps: about \d+ %"
    )
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
        ("after epoch 1", "sks-000001.safetensors", 2),
        ("final", "sks.safetensors", 4),
    ]
    assert [(row["strength"], row["file"], row["images"][0]) for row in record["strengths"]] == [
        (0.6, "sks-000001.safetensors", "000001-0.6-01.png"),
        (0.8, "sks-000001.safetensors", "000001-0.8-01.png"),
        (1.0, "sks-000001.safetensors", "000001-01.png"),
    ]
    found = pixels(folder)
    assert set(found) == {image for row in record["rows"] + record["strengths"] for image in row["images"]}
    assert len(set(found.values())) == len(found) == 30  # each LoRA, strength, prompt and seed gives another image
    latents = {f".latents/00000{epochs}-06.safetensors" for epochs in range(3)}
    prefix = "samples/sks/"
    assert {name.removeprefix(prefix) for name in sampled.files if name.startswith(prefix)} == {*found, "samples.json", *latents}
    for name, lora in (("000001-06.png", "sks-000001:1"), ("000001-0.6-06.png", "sks-000001:0.6")):
        with Image.open(folder / name) as image:
            shown = image.info["parameters"]
        assert shown.startswith(f"1girl <lora:{lora}>\nSteps: 2, Sampler: Euler, CFG scale: 6, Seed: 5, Size: 64x64, Model: ")


def color_of(image: Image.Image) -> np.ndarray:
    return (np.asarray(image.convert("RGB")).mean(axis=(0, 1)) / 255).astype(np.float32)


def test_every_image_has_its_likeness_between_floor_and_ceiling(sampled):
    folder, photographs = sampled.stage.output / "samples" / "sks", sampled.stage.images
    record = json.loads(sampled.files["samples/sks/samples.json"])
    data = [color_of(Image.open(path)) for path in sorted(photographs.glob("*.[pj][np]g"))]
    assert len(data) == 4
    rows = record["rows"] + record["strengths"]
    assert len(rows) == 6
    for row in rows:
        assert row["unscored"] == [""] * 6
        for name, likeness in zip(row["images"], row["likeness"], strict=True):
            color = color_of(Image.open(folder / name))
            expected = np.mean([1 - np.linalg.norm(color - each) for each in data])
            assert likeness == pytest.approx(expected, abs=1e-4)
    others = [np.mean([1 - np.linalg.norm(one - other) for other in data if other is not one]) for one in data]
    assert record["ceiling"] == pytest.approx(np.mean(others), abs=1e-4)
    assert record["floor"] == record["rows"][0]["likeness"][5]
    lines = [json.loads(line) for line in sampled.files["lora/metrics.jsonl"].splitlines()]
    assert [(line["step"], line["likeness"]) for line in lines if "likeness" in line] == [
        (row["step"] - 1, pytest.approx(np.mean(row["likeness"][:5]))) for row in record["rows"][1:]
    ]


def test_the_recommended_file_is_the_chosen_one_with_the_reason(sampled):
    record = json.loads(sampled.files["samples/sks/samples.json"])
    lora, latents = sampled.stage.output / "lora", sampled.stage.output / "samples" / "sks" / ".latents"
    base, *loras = (load_file(latents / f"00000{epochs}-06.safetensors")["latents"] for epochs in range(3))
    distances = [(each - base).square().mean().sqrt().item() for each in loras]
    saves = [
        Save(row["file"], row["epochs"], tuple(row["likeness"][:5]), distance)
        for row, distance in zip(record["rows"][1:], distances, strict=True)
    ]
    save, reason = choose(saves)
    assert save.file == "sks-000001.safetensors"  # so that the file is read, and copied
    strength, verdict = lowest_strength({row["strength"]: row["likeness"][:5] for row in record["strengths"]})
    recommended = {"file": save.file, "strength": strength, "reason": f"{reason} {verdict}"}
    assert record["recommended"] == recommended
    line = f"recommended: {save.file} at strength {strength:g}. {reason} {verdict}"
    assert line in sampled.output.splitlines()

    file = read_header(lora / "sks-recommended.safetensors")
    assert tensors_of_loras(sampled.stage)["sks-recommended.safetensors"] == tensors_of_loras(sampled.stage)[save.file]
    assert file.metadata["sshs_model_hash"] == data_sha256(file.path)
    of_chosen = read_header(lora / save.file).metadata
    thumbnail = file.metadata.pop("modelspec.thumbnail")  # a file on the way is written before its images
    assert thumbnail.startswith("data:image/jpeg;base64,")
    assert file.metadata == of_chosen | {f"loracat_recommended_{name}": str(value) for name, value in recommended.items()}
    workflow = json.loads(sampled.files["lora/sks.workflow.json"])
    assert workflow["2"]["inputs"]["lora_name"] == "sks-recommended.safetensors"
    assert workflow["2"]["inputs"]["strength_model"] == strength
    assert (workflow["1"]["inputs"]["ckpt_name"], workflow["3"]["inputs"]["text"]) == ("tiny-sdxl.safetensors", "sks")
    next_step = next(line for line in sampled.output.splitlines() if line.startswith("next: "))
    assert f"copy {file.path} to ComfyUI's models/loras and drag sks.workflow.json into its window" in next_step


def test_training_is_the_same_with_and_without(sampled, stage):
    add_images(stage)
    output = stage.trained(**RUN | {"SAMPLES": "false"})
    before, after = tensors_of_loras(sampled.stage), tensors_of_loras(stage)
    recommended = after.pop("sks-recommended.safetensors")
    assert after == {name: tensors for name, tensors in before.items() if name in after}
    assert len(after) == 2
    lines = [line for line in sampled.files["lora/metrics.jsonl"].splitlines() if b"likeness" not in line]
    assert stage.files()["lora/metrics.jsonl"].splitlines() == lines
    assert not (stage.output / "samples").exists()
    assert recommended == after["sks.safetensors"]
    reason = "It is the last one; likeness was not compared: SAMPLES=false."
    assert f"recommended: sks.safetensors at strength 1. {reason}\n" in output


@pytest.mark.long
def test_a_run_that_is_stopped_has_the_same_images(sampled, stage, tmp_path):
    """Stopped within the row of the base model, and that of the first epoch; and while the last images are still to be scored,
    by a process that takes its time."""
    add_images(stage)
    folder = stage.output / "samples" / "sks"

    def stopped_at(images: int, **variables) -> int:
        def disturb(is_over) -> None:
            while len(list(folder.glob("*.png"))) < images and not is_over.wait(0.005):
                pass
            os.kill(os.getpid(), signal.SIGTERM)

        return stage.disturbed(0, disturb, **SCORED | variables).returncode

    (tmp_path / "dlib.py").write_text("import time\ntime.sleep(600)")
    for images in (1, 9, 18):
        assert stopped_at(images, PYTHONPATH=SCORED["PYTHONPATH"] if images < 18 else tmp_path) == 143
        assert not stage.lora.exists()
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    assert len(times) == 18
    assert "continuing at step 4" in stage.trained(**SCORED)
    kept = {name: content for name, content in sampled.files.items() if name.startswith("samples/") or name.endswith(".jsonl")}
    files = stage.files()
    assert {name: files.get(name) for name in kept} == kept
    assert {name for name in files if name.startswith("samples/")} == {name for name in kept if name.startswith("samples/")}
    for name, time in times.items():
        assert (folder / name).stat().st_mtime_ns == time  # what was complete is not rendered again
    assert tensors_of_loras(stage) == tensors_of_loras(sampled.stage)


@pytest.mark.long
def test_a_finished_run_renders_nothing_and_a_new_one_archives_its_images(sampled, stage):
    shutil.copytree(sampled.stage.dataset, stage.dataset, dirs_exist_ok=True)
    shutil.copytree(sampled.stage.output, stage.output)
    before = stage.files()
    assert "nothing to do" in stage.trained(**SCORED | {"SAMPLE_SEED": 7})
    assert stage.files() == before
    stage.trained(**RUN | {"LORA_RANK": 3, "SAMPLES": "false"})
    (archive,) = (stage.output / "lora" / "archive").iterdir()
    assert pixels(archive / "samples") == pixels(sampled.stage.output / "samples" / "sks")
    assert not (stage.output / "samples" / "sks").exists()


@pytest.fixture(scope="module")
def extended(sampled, shared_stage) -> Sampled:
    """The same run, extended to three epochs without likeness. Read only."""
    stage = shared_stage("extended")
    shutil.copytree(sampled.stage.dataset, stage.dataset, dirs_exist_ok=True)
    shutil.copytree(sampled.stage.output, stage.output)
    return Sampled(stage, stage.trained(**RUN | {"NUM_TRAIN_EPOCHS": 3, "FACE_MODEL": "off"}), stage.files())


def test_a_run_that_is_extended_keeps_its_rows(sampled, extended):
    stage, output = extended.stage, extended.output
    folder = stage.output / "samples" / "sks"
    times = {path.name: path.stat().st_mtime_ns for path in (sampled.stage.output / "samples" / "sks").glob("*.png")}
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
    reason = "It is the last one; likeness was not compared: FACE_MODEL=off."
    assert record["recommended"] == {"file": "sks.safetensors", "strength": 1.0, "reason": reason}
    assert f"recommended: sks.safetensors at strength 1. {reason}" in output.splitlines()
    assert (record["floor"], record["ceiling"]) == (None, None)
    for row in rows:
        assert (row["likeness"], row["unscored"]) == ([None] * 6, [""] * 6)
    assert b"likeness" not in stage.files()["lora/metrics.jsonl"]
    again = pixels(folder)
    assert {name: again[name] for row in rows[:3] for name in row["images"]} == {
        name: image for name, image in before.items() if len(name) == len("000002-01.png")
    }


def test_rows_stay_alike_when_a_setting_changes(sampled, extended, stage):
    """The run is extended with other prompts and steps: the LoRA after the first epoch is rendered again, from its file."""
    shutil.copytree(sampled.stage.dataset, stage.dataset, dirs_exist_ok=True)
    shutil.copytree(sampled.stage.output, stage.output)
    folder = stage.output / "samples" / "sks"
    before = stage.files()["lora/sks-000001.safetensors"]
    prompts = "sks --d 1\nsks --d 2 --s 2\ncup --d 3"
    stage.trained(**RUN | {"SAMPLE_STEPS": 1, "SAMPLE_PROMPTS": prompts, "NUM_TRAIN_EPOCHS": 3})
    record = json.loads((folder / "samples.json").read_text())
    assert [row["label"] for row in record["rows"]] == ["base model", "after epoch 1", "after epoch 2", "final"]
    assert len(pixels(folder)) == 3 * 6
    for row in record["rows"] + record["strengths"]:
        for name, steps in zip(row["images"], (1, 2, 1), strict=True):
            with Image.open(folder / name) as image:
                assert f"Steps: {steps}, " in image.info["parameters"]
    assert sorted(path.name[:9] for path in (folder / ".latents").iterdir()) == [f"00000{epochs}-03" for epochs in range(4)]
    assert stage.files()["lora/sks-000001.safetensors"] == before
    final = "sks.safetensors"  # its weights were elsewhere while the other LoRA was rendered
    assert tensors_of_loras(stage)[final] == tensors_of_loras(extended.stage)[final] != tensors_of_loras(sampled.stage)[final]
    # fp16 in the file: nearly the same as with the weights in memory
    with Image.open(folder / "000001-02.png") as again, Image.open(sampled.stage.output / "samples/sks/000001-03.png") as first:
        assert first.info["parameters"].partition("\n")[2] == again.info["parameters"].partition("\n")[2]
        assert np.abs(np.asarray(first, dtype=int) - np.asarray(again, dtype=int)).mean() < 2


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
        return Renderer(step, schedule, files, vae, tiled=False, in_turn=False), {"step": step, "vae": vae, "files": files}

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
    difference = np.abs(np.asarray(renderer.decoded(renderer.latents(PROMPT)), dtype=int) - np.asarray(image, dtype=int))
    assert difference.max() <= 1
    assert renderer.decoded(renderer.latents(PROMPT)).size == (128, 64)


def test_a_schedule_with_zero_terminal_snr_begins_at_pure_noise():
    for schedule, first in ((SCHEDULES["zero terminal SNR"], 999), (SCHEDULES["epsilon"], 951)):
        scheduler = scheduler_of(schedule)
        scheduler.set_timesteps(20)
        assert int(scheduler.timesteps[0]) == first
        torch.testing.assert_close(scheduler.alphas_cumprod[:-1].double(), alphas_cumprod(schedule)[:-1], rtol=1e-4, atol=1e-6)


def test_the_fast_engine_renders_what_the_plain_one_does(renderer_of):
    plain, fast = (renderer_of(engine=engine)[0].latents(PROMPT) for engine in ("plain", "fast"))
    assert_same(fast, plain, 1e-3)


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
def test_a_lora_file_gives_the_images_of_the_weights_it_was_written_from(renderer_of, tmp_path, kind):
    renderer, parts = renderer_of(kind=kind)
    adapter, file = parts["step"].adapter, tmp_path / "mia.safetensors"
    expected = renderer.latents(PROMPT)
    write_lora(file, adapter.modules, {})
    assert is_lora_of(file, adapter.modules)
    assert not is_lora_of(file, adapter.modules[1:])
    with torch.no_grad():
        adapter.weights.mul_(0.5)
    with pytest.raises(AssertionError):
        assert_same(renderer.latents(PROMPT), expected, 1e-2)
    load_lora(file, adapter.modules)
    assert_same(renderer.latents(PROMPT), expected, 1e-2 if kind in ("lora", "dora") else 3e-2)  # fp16 rounds each factor
    file.write_bytes(file.read_bytes()[:-1])
    assert not is_lora_of(file, adapter.modules)
    assert not is_lora_of(tmp_path / "gone.safetensors", adapter.modules)


@pytest.mark.parametrize(
    ("kind", "engine"),
    [
        ("lora", "fast"),
        ("lokr", "plain"),
        *(pytest.param(kind, "plain", marks=pytest.mark.long) for kind in ("lora", "dora", "loha")),
    ],
)
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
    whole = np.asarray(renderer.decoded(renderer.latents(PROMPT)), dtype=int)
    step, sizes = parts["step"], []
    predict = step.predict
    step.predict = lambda noisy, *others: sizes.append(len(noisy)) or predict(noisy, *others)
    tiled = Renderer(step, EPSILON, parts["files"], parts["vae"], tiled=True, in_turn=False)
    assert_same(tiled.latents(PROMPT), renderer.latents(PROMPT), 1e-3)
    assert sizes == [1, 1] * PROMPT.steps
    parts["vae"].tile_sample_min_size, parts["vae"].tile_latent_min_size = 64, 8
    image = np.asarray(tiled.decoded(tiled.latents(PROMPT)), dtype=int)
    assert image.shape == whole.shape
    assert np.abs(image - whole).mean() < 16


def test_generation_parameters_are_those_of_a1111():
    assert generation_parameters(PROMPT, "sdxl, v1", "sks-000005.safetensors") == (
        "a cat <lora:sks-000005:1>\nNegative prompt: blurry\n"
        'Steps: 2, Sampler: Euler, CFG scale: 4, Seed: 5, Size: 128x64, Model: "sdxl, v1", Version: LoRACat 2.0.0'
    )
    assert generation_parameters(SamplePrompt("x\ny", "user", "", 64, 64, 0, 1, 1), "base", None).startswith("x\ny\nSteps: 1, ")
