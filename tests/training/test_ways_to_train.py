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


@pytest.mark.long
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


@pytest.mark.long
def test_another_loss_is_another_run(images):
    assert "engine: fast (supports these settings)" in images.trained(**QUICK)
    first = losses(images.output)
    output = images.trained(**QUICK, LOSS="huber")
    assert "the earlier LoRA" in output
    assert losses(images.output)[0] != first[0]
    assert "nothing to do" in images.trained(**QUICK, LOSS="huber")


@pytest.mark.long
def test_a_dora_is_trained_by_the_fast_engine_and_has_its_scales(images):
    output = images.trained(**QUICK, LORA_TYPE="dora", ENGINE="fast")
    assert "engine: fast (ENGINE=fast)" in output
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


@pytest.mark.long
def test_automatic_quantization_is_decided_again_for_a_run_that_follows_a_finished_one(images):
    """A finished run keeps its choice, and so does one that is extended."""
    first = QUICK | {"BASE_QUANTIZATION": "auto", "NUM_TRAIN_EPOCHS": 1}
    assert "base quantization: none (one image needs" in images.trained(**first)
    output = images.trained(**first)
    assert "base quantization: none (as in the checkpoint)" in output
    assert "nothing to do" in output
    output = images.trained(**first | {"NUM_TRAIN_EPOCHS": 2})
    assert "base quantization: none (as in the checkpoint)" in output
    assert "one image needs" not in output
    output = images.trained(**first, TRAIN_SEED=1)
    assert "base quantization: none (one image needs" in output
    repeated = [line for line in output.splitlines() if line.startswith(("base quantization", "training on", "mixed precision"))]
    assert len(repeated) == 3  # decided before anything is printed
    assert "the earlier LoRA" in output
    assert "nothing to do" in images.trained(**first, TRAIN_SEED=1)
    resolved = (images.output / "lora" / "training_config_resolved.toml").read_text(encoding="utf-8")
    assert "fresh = false" in resolved


@pytest.mark.long
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
    refused = images.run(**QUICK, ENGINE="fast", LORA_TYPE="lokr")
    assert refused.returncode == 2
    problem = "ENGINE=fast: the fast engine does not support LORA_TYPE=lokr; set ENGINE=auto"
    assert refused.stderr == f"train_lora: invalid settings:\n  - {problem}\n"
    assert not images.lora.exists()


def test_a_wrong_choice_is_refused_before_there_are_images(stage):
    """run.sh checks every stage before it collects for hours."""
    refused = stage.run("--settings", ENGINE="fast", LORA_TYPE="lokr")
    assert "ENGINE=fast: the fast engine does not support LORA_TYPE=lokr; set ENGINE=auto" in refused.stderr
    assert refused.returncode == 2
    refused = stage.run("--check=ahead", OPTIMIZER="adamw8bit")
    assert "OPTIMIZER=adamw8bit needs" in refused.stderr or "OPTIMIZER=adamw8bit: the package" in refused.stderr
    assert refused.returncode == 2


@pytest.mark.long
def test_the_average_of_a_stopped_run_ends_as_the_same_lora(images):
    """The file holds the average, and not the weights of the last step."""
    settings = LONG | {"EMA_DECAY": 0.9, "LORAPLUS_RATIO": 4}
    images.trained(**settings, OUTPUT_DIR=images.output.with_name("whole"))
    assert images.stopped(2, signal.SIGTERM, **settings).returncode == 143
    images.trained(**settings)
    whole = load_file(images.output.with_name("whole") / "lora" / images.lora.name)
    resumed = load_file(images.lora)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    (checkpoint,) = (images.output / "state").rglob("*.safetensors")
    kept = load_file(checkpoint)
    in_file = sum(tensor.double().square().sum() for name, tensor in resumed.items() if not name.endswith(".alpha"))
    assert in_file == pytest.approx(kept["ema"].double().square().sum().item(), rel=1e-3)
    assert in_file != pytest.approx(kept["weights"].double().square().sum().item(), rel=2e-3)


@pytest.mark.long
def test_schedule_free_averages_and_a_stopped_run_ends_with_the_same_lora(images):
    pytest.importorskip("schedulefree")
    settings = LONG | {"OPTIMIZER": "schedulefree"}
    images.trained(**settings, OUTPUT_DIR=images.output.with_name("whole"))
    assert images.stopped(2, signal.SIGTERM, **settings).returncode == 143
    images.trained(**settings)
    whole, resumed = (load_file(path) for path in (images.output.with_name("whole") / "lora" / images.lora.name, images.lora))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.long
def test_what_the_base_model_knows_of_the_class_is_part_of_a_run(images):
    """With every other way to change the objective at once; another class is another run, and the same one is finished."""
    settings = QUICK | {"PRIOR_PRESERVATION": 1, "LORA_L2": 1e-3, "LOSS": "huber_snr", "LOSS_WEIGHTING": "debiased"}
    settings |= {"TIMESTEP_MIN": 100, "TIMESTEP_MAX": 900, "TIMESTEP_SAMPLING": "logit_normal", "TIMESTEP_SHIFT": 2}
    settings |= {"LR_SCHEDULER": "cosine_with_restarts", "OPTIMIZER": "adafactor"}
    refused = images.run(**settings)
    problem = "PRIOR_PRESERVATION needs the word for the kind of subject, which the captions do not have"
    assert refused.stderr == f"train_lora: {problem}: set SUBJECT_CLASS, for example SUBJECT_CLASS=woman\n"
    assert refused.returncode == 2
    images.add("coffee", caption="sks, a person, outdoors")
    assert "prior preservation: weight 1, 'person' for 'sks' (from the captions)" in images.run("--check", **settings).stdout
    output = images.trained(**settings)
    assert "prior preservation: weight 1, 'person' for 'sks' (from the captions)" in output
    assert "weighting debiased" in output
    resolved = (images.output / "lora" / "training_config_resolved.toml").read_text(encoding="utf-8")
    assert 'subject_class = "person"' in resolved
    assert "nothing to do" in images.trained(**settings, SUBJECT_CLASS="person")
    first = losses(images.output)
    output = images.trained(**settings, SUBJECT_CLASS="astronaut")
    assert "'astronaut' for 'sks' (as set)" in output
    assert losses(images.output)[0] == first[0]  # the LoRA adds nothing yet
    assert losses(images.output)[-1] != first[-1]


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


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(
            {"LORA_TYPE": "loha", "LORA_CONV_RANK": 2, "LORA_RANK_PATTERN": r"transformer_blocks\.[1-9]=0 attn2=3:1.5"},
            marks=pytest.mark.long,
        ),
        pytest.param(
            {"LORA_DROPOUT": 0.3, "LORA_RSLORA": "true", "LORA_RANK_PATTERN": r"transformer_blocks\.[1-9]=0"},
            marks=pytest.mark.long,
        ),
    ],
    ids=["loha", "dropout"],
)
def test_a_stopped_run_of_any_adapter_ends_with_the_same_lora(images, settings):
    settings = LONG | settings
    output = images.trained(**settings, OUTPUT_DIR=images.output.with_name("whole"))
    assert "engine: plain (the fast engine does not support LORA_" in output
    whole = load_file(images.output.with_name("whole") / "lora" / images.lora.name)
    assert images.stopped(2, signal.SIGTERM, **settings).returncode == 143
    assert "continuing at step" in images.trained(**settings)
    resumed = load_file(images.lora)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert "nothing to do" in images.trained(**settings)


@pytest.mark.long
def test_a_run_begins_from_a_lora_file_and_is_continued_without_it(images, tmp_path):
    few = {"LORA_RANK_PATTERN": r"transformer_blocks\.[1-9]=0"}
    first = images.output.with_name("first")
    images.trained(**QUICK, **few, OUTPUT_DIR=first)
    lora, old = first / "lora" / images.lora.name, tmp_path / "old.safetensors"
    old.write_bytes(lora.read_bytes())
    refused = images.run(**QUICK, **few, OUTPUT_DIR=first, INIT_LORA=lora)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "INIT_LORA: this run would replace" in refused.stderr
    refused = images.run(**QUICK, **few, INIT_LORA=old, LORA_RANK=5, OUTPUT_NAME="mia")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "has rank 2 instead of 5" in refused.stderr

    how = LONG | few | {"INIT_LORA": old, "OUTPUT_NAME": "mia"}
    output = images.trained(**how, OUTPUT_DIR=images.output.with_name("whole"))
    assert re.search(r"beginning with \d+ layers of .*old.safetensors", output)
    assert losses(images.output.with_name("whole"))[0] != losses(first)[0]
    assert images.stopped(2, signal.SIGTERM, **how).returncode == 143
    old.rename(tmp_path / "moved.safetensors")
    checked = images.run("--check", **how)
    assert re.search(r"a run would continue at step \d", checked.stdout), checked.stderr
    checked = images.run("--check", **how, TRAIN_SEED=1)
    assert checked.returncode == 2
    assert "with other settings or data:" in checked.stderr
    output = images.trained(**how)
    assert "continuing at step" in output
    assert "beginning with" not in output
    whole = load_file(images.output.with_name("whole") / "lora" / "mia.safetensors")
    resumed = load_file(images.output / "lora" / "mia.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert "nothing to do" in images.trained(**how)
    assert "this run is finished: there is nothing to do" in images.run("--check", **how).stdout
    refused = images.run(**how, OUTPUT_DIR=images.output.with_name("third"))
    assert refused.stderr == f"train_lora: INIT_LORA: {old}: no such file\n"
    for another in ({"TRAIN_SEED": 1}, {"FRESH": 1}):
        checked, refused = images.run("--check", **how | another), images.run(**how | another)
        assert f"INIT_LORA: {old}: no such file\n" in checked.stderr
        assert refused.stderr == f"train_lora: INIT_LORA: {old}: no such file\n"
        assert checked.returncode == refused.returncode == 2


def test_a_check_lists_what_is_wrong_with_layers_and_the_file_to_begin_from(images, tmp_path):
    wrong = {"LORA_RANK_PATTERN": "attn3=4", "INIT_LORA": tmp_path / "gone.safetensors"}
    checked = images.run("--check", **QUICK, **wrong)
    assert checked.returncode == 2
    assert checked.stderr.splitlines()[1:] == [
        "  - LORA_RANK_PATTERN: no adapted layer's name contains 'attn3'; convolutions have a rank with LORA_CONV_RANK only",
        f"  - INIT_LORA: {tmp_path / 'gone.safetensors'}: no such file",
    ]
    refused = images.run(**QUICK, ENGINE="fast", LORA_DROPOUT=0.1)
    assert refused.stderr == (
        "train_lora: invalid settings:\n  - ENGINE=fast: the fast engine does not support LORA_DROPOUT=0.1; set ENGINE=auto\n"
    )
    (tmp_path / "text.safetensors").write_text("not a LoRA", encoding="utf-8")
    refused = images.run(**QUICK, INIT_LORA=tmp_path / "text.safetensors")
    assert (refused.returncode, refused.stderr.count("\n")) == (5, 1)
