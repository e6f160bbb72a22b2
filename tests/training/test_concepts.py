"""A run with two trigger words and regularization images, as a user sees it: plan, files, samples, and a stop in between."""

import json
import shutil
import signal

import pytest
from safetensors import safe_open

from common.files import read_json_lines

SETTINGS = {"NUM_TRAIN_EPOCHS": 2, "SAVE_EVERY_EPOCHS": 0, "LEARNING_RATE": 0.01, "LORA_ALPHA": 1, "PRIOR_WEIGHT": 0.5}


def add_concepts(stage) -> None:
    stage.add("astronaut", "alice/a.png", "alice, woman, smile")
    stage.add("coffee", "3_bob/b.png", "bob, man, cup")
    (stage.images / "alice" / "folder.toml").write_text('repeats = 2\ntrigger = "alice"\nclass = "woman"\n')
    (stage.images / "3_bob" / "folder.toml").write_text('trigger = "bob"\n')
    stage.add("chelsea", "../regularization/1_grey_cat/c.png", None)
    stage.add("rocket", "../regularization/1_grey_cat/d.png", "a rocket")


@pytest.fixture(scope="module")
def done(shared_stage):
    stage = shared_stage("concepts")
    (stage.dataset / "regularization").mkdir(parents=True)
    add_concepts(stage)
    said = stage.trained(**SETTINGS | {"SAMPLES": "true", "SAMPLE_STEPS": 1, "SAMPLE_SIZE": 64})
    return stage, said


def test_the_plan_names_each_concept_and_the_regularization_images(done):
    _, said = done
    assert "trigger word alice: 1 images, 4 training samples" in said
    assert "trigger word bob: 1 images, 6 training samples" in said
    assert "regularization: 2 images (grey cat) of weight 0.5, one with each training sample" in said
    assert "with 'bob' or 'alice' in the prompt" in said


def test_check_shows_a_table_of_the_folders(done):
    stage, _ = done
    shown = [line.split() for line in stage.run("--check", **SETTINGS).stdout.splitlines()]
    for row in (
        ["images/3_bob", "1", "1", "0", "3", "bob", "-", "-"],
        ["images/alice", "1", "1", "0", "2", "alice", "-", "-"],
        ["regularization/1_grey_cat", "2", "2", "0", "1", "grey", "cat", "-", "-"],
    ):
        assert row in shown


def test_the_lora_names_all_trigger_words(done):
    stage, _ = done
    with safe_open(stage.lora, "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.trigger_phrase"] == "bob, alice"
    assert (metadata["ss_num_reg_images"], metadata["ss_prior_loss_weight"]) == ("2", "0.5")
    assert metadata["ss_num_train_images"] == "2"


def test_sample_images_show_each_concept(done):
    stage, _ = done
    record = json.loads((stage.output / "samples" / "sks" / "samples.json").read_text())
    texts = [(prompt["text"].partition(",")[0], prompt["subject"]) for prompt in record["prompts"]]
    assert texts == [("bob", "bob")] * 4 + [("alice", "alice")] * 4 + [("man", ""), ("woman", "")]


@pytest.mark.long
def test_a_run_that_is_stopped_ends_with_the_same_weights(done, stage):
    first, _ = done
    shutil.copytree(first.dataset, stage.dataset, dirs_exist_ok=True)
    assert stage.stopped(2, signal.SIGTERM, **SETTINGS).returncode == 143
    assert "continuing at step" in stage.trained(**SETTINGS)
    losses = [
        [(line["step"], line["loss"]) for line in read_json_lines(each.output / "lora" / "metrics.jsonl")]
        for each in (first, stage)
    ]
    assert losses[0] == losses[1]
    tensors = []
    for each in (first, stage):
        with safe_open(each.lora, "np") as file:
            tensors.append({name: file.get_tensor(name).tobytes() for name in file.keys()})  # noqa: SIM118
    assert tensors[0] == tensors[1]


@pytest.mark.long
def test_other_regularization_images_are_another_run(done, stage):
    first, _ = done
    shutil.copytree(first.dataset, stage.dataset, dirs_exist_ok=True)
    assert stage.stopped(2, signal.SIGTERM, **SETTINGS).returncode == 143
    (stage.dataset / "regularization" / "1_grey_cat" / "d.txt").write_text("another rocket")
    refused = stage.run(**SETTINGS)
    assert refused.returncode == 2
    assert "regularization images: changed" in refused.stderr
