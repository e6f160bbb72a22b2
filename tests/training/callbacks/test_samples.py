"""Sample images: what is rendered, that it equals diffusers' own pipeline, and that training is the same with and without them."""

import json
import re
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

CPU = torch.device("cpu")
RUN = {"SAMPLES": "true", "SAMPLE_STEPS": 2, "SAMPLE_EVERY_EPOCHS": 1, "SAVE_EVERY_EPOCHS": 1, "LORA_TARGETS": "attention"}
RUN |= {"LEARNING_RATE": 0.01, "NUM_TRAIN_EPOCHS": 3, "TRAIN_BATCH_SIZE": 1}


@pytest.fixture
def data(stage):
    """The stage with two images."""
    stage.add("astronaut", caption="sks, 1girl, smile, orange suit")
    stage.add("coffee", "coffee.jpg", caption="sks, cup, table")
    return stage


def pixels(folder) -> dict[str, bytes]:
    """The pixels of every image in the folder."""
    found = {}
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            found[path.name] = image.tobytes()
    return found


def weights(stage) -> dict[str, dict[str, bytes]]:
    """The tensors of every LoRA file."""
    loras = sorted((stage.output / "lora").glob("*.safetensors"))
    return {path.name: {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()} for path in loras}


def test_training_is_the_same_with_and_without_and_all_saves_are_rendered(data):
    printed = data.trained(**RUN)
    with_samples, metrics = weights(data), (data.output / "lora" / "metrics.jsonl").read_bytes()
    folder = data.output / "samples" / "sks"
    record = json.loads((folder / "samples.json").read_text())
    assert re.search(r"^sample images: 4 prompts x 4 \(base model and 3 LoRAs\), 64x64, 2 steps: about \d+ % of", printed, re.M)
    assert [(prompt["text"], prompt["seed"], prompt["kind"]) for prompt in record["prompts"]] == [
        ("sks", 0, "trigger"),
        ("sks, standing on a beach at sunset", 1, "scene"),
        ("sks, in a snowy forest", 2, "scene"),
        ("1girl", 3, "class"),
    ]
    assert [(row["label"], row["file"], row["step"]) for row in record["rows"]] == [
        ("base model", None, 0),
        ("after epoch 1", "sks-000001.safetensors", 2),
        ("after epoch 2", "sks-000002.safetensors", 4),
        ("final", "sks.safetensors", 6),
    ]
    found = pixels(folder)
    assert sorted(found) == [image for row in record["rows"] for image in row["images"]]
    assert len(set(found.values())) == 16  # each LoRA, prompt and seed gives another image
    assert {name.rpartition("/")[2] for name in data.files() if name.startswith("samples/")} == {*found, "samples.json"}

    shutil.rmtree(data.output)
    data.trained(**RUN | {"SAMPLES": "false"})
    assert weights(data) == with_samples
    assert (data.output / "lora" / "metrics.jsonl").read_bytes() == metrics
    assert not (data.output / "samples").exists()
