"""What the LoRA files of a job say about themselves."""

import base64
import io
import json
import tomllib
from dataclasses import replace

import pytest
from PIL import Image

import training.lora_metadata as metadata_module
from common.errors import SettingsError
from common.project import ProjectSettings
from common.settings import VERSION
from training.config import DataSettings, LoraSettings, ModelSettings, RunSettings, TrainSettings
from training.data.dataset import read_inputs
from training.job import TrainingJob, resolve_job
from training.lora_metadata import lora_metadata, network_of, thumbnail
from training.plan import short_hash
from training.run import with_class_of_prior
from training.system.process_group import ProcessGroup
from training.trainer import prepare_outputs


def job_of(stage, prediction_type: str = "auto", **data: object) -> TrainingJob:
    """Four epochs of three images of one size."""
    for number, caption in enumerate(("sks, smile, tree", "sks, smile", "sks, año")):
        stage.add("astronaut", f"{number}.png", caption)
    project = ProjectSettings("sks", stage.dataset, stage.output, stage.models)
    settings = TrainSettings(
        model=ModelSettings(base_model=str(stage.base), prediction_type=prediction_type),
        data=DataSettings(resolution=64, **data),
        lora=LoraSettings(lora_rank=2, lora_alpha=1.0),
        run=RunSettings(train_batch_size=2, num_train_epochs=4),
    )
    return resolve_job(ProcessGroup(), project, settings, read_inputs(project, settings), comfyui="")


def test_header_has_the_entries_that_programs_read(stage):
    job = job_of(stage)
    about = lora_metadata(job, epochs=4)
    expected = {
        "ss_v2": "False",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "1.0",
        "ss_network_args": "{}",
        "ss_output_name": "sks",
        "ss_sd_model_name": job.base.name,
        "ss_resolution": "(64, 64)",
        "ss_num_train_images": "3",
        "ss_num_epochs": "4",
        "ss_max_train_steps": "6",
        "ss_network_dropout": "None",
        "ss_total_batch_size": "2",
        "ss_training_comment": f"LoRACat {VERSION}",
        "modelspec.description": f"Trained on 3 images for 4 epochs with LoRACat {VERSION}. Write sks in the prompt.",
        "ss_steps": "6",
        "ss_epoch": "4",
        "ss_optimizer": "torch.optim.AdamW",
        "ss_lr_scheduler": "constant",
        "ss_lr_warmup_steps": str(job.plan.warmup_steps),
        "ss_loss_type": "l2",
        "ss_min_snr_gamma": "5.0",
        "ss_debiased_estimation": "False",
        "ss_noise_offset": "0.0357",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.title": "sks",
        "modelspec.resolution": "64x64",
        "modelspec.prediction_type": "epsilon",
        "modelspec.trigger_phrase": "sks",
        "loracat_fingerprint": short_hash(job.identity.fingerprint),
        "loracat_version": VERSION,
    }
    assert expected.items() <= about.items()
    assert all(isinstance(value, str) for value in about.values())
    assert {"modelspec.implementation", "modelspec.date"} <= about.keys()
    assert json.loads(about["ss_tag_frequency"]) == {"dataset": {"sks": 3, "smile": 2, "tree": 1, "año": 1}}
    assert {"ss_v_parameterization", "modelspec.author", "modelspec.thumbnail"}.isdisjoint(about)
    assert not [
        value
        for value in about.values()
        if "/"
        in value.replace("https://github.com/Stability-AI/generative-models", "").replace("stable-diffusion-xl-v1-base/lora", "")
    ]
    assert lora_metadata(job, epochs=2)["ss_steps"] == "3"


def test_objective_is_in_the_header_in_kohyas_words(stage):
    job = job_of(stage)
    about = lora_metadata(job, epochs=1)
    assert "ss_huber_schedule" not in about
    objective = replace(job.settings.objective, loss="huber_snr", loss_weighting="debiased")
    job = replace(job, settings=replace(job.settings, objective=objective), plan=replace(job.plan, min_snr_gamma=0.0))
    about = lora_metadata(job, epochs=1)
    words = {"ss_loss_type": "huber", "ss_huber_schedule": "snr", "ss_huber_c": "0.1", "ss_debiased_estimation": "True"}
    assert (words | {"ss_min_snr_gamma": "None"}).items() <= about.items()


def test_rare_tags_are_left_out_of_a_header_that_would_be_too_large(stage, monkeypatch):
    monkeypatch.setattr(metadata_module, "_MAX_TAGS_BYTES", 35)
    about = lora_metadata(job_of(stage), epochs=1)
    assert json.loads(about["ss_tag_frequency"]) == {"dataset": {"sks": 3, "smile": 2}}


def test_v_prediction_is_in_the_header(stage):
    about = lora_metadata(job_of(stage, "v_prediction"), epochs=1)
    assert (about["modelspec.prediction_type"], about["ss_v_parameterization"]) == ("v", "True")


def test_author_and_description_are_those_of_the_settings(stage):
    job = job_of(stage)
    saving = replace(job.settings.saving, lora_author="Anna B.", lora_description="Mia, in winter")
    about = lora_metadata(replace(job, settings=replace(job.settings, saving=saving)), epochs=4)
    assert about["modelspec.author"] == "Anna B."
    assert about["modelspec.description"] == about["ss_training_comment"] == "Mia, in winter"


@pytest.mark.parametrize(
    ("settings", "module", "arguments"),
    [
        ({}, "networks.lora", {}),
        ({"lora_conv_rank": 8}, "networks.lora", {"conv_dim": "8", "conv_alpha": "8.0"}),
        ({"lora_conv_rank": 8, "lora_alpha": 4.0}, "networks.lora", {"conv_dim": "8", "conv_alpha": "4.0"}),
        ({"lora_rank_pattern": " ff=0  attn2=8:4 "}, "networks.lora", {"rank_pattern": "ff=0 attn2=8:4"}),
        ({"lora_rslora": True}, "lycoris.kohya", {"algo": "lora", "rs_lora": "True"}),
        ({"lora_type": "dora"}, "lycoris.kohya", {"algo": "lora", "dora_wd": "True"}),
        ({"lora_type": "loha"}, "lycoris.kohya", {"algo": "loha"}),
        ({"lora_type": "lokr"}, "lycoris.kohya", {"algo": "lokr", "factor": "-1"}),
        ({"lora_type": "lokr", "lokr_factor": 8}, "lycoris.kohya", {"algo": "lokr", "factor": "8"}),
    ],
)
def test_a_network_is_described_as_kohyas_trainer_and_lycoris_do(settings, module, arguments):
    assert network_of(LoraSettings(**settings)) == (module, arguments)


def test_a_prior_needs_captions_with_the_trigger_word(stage):
    job = job_of(stage)
    samples = replace(job.settings.samples, subject_class="woman")
    settings = replace(job.settings, samples=samples, objective=replace(job.settings.objective, prior_preservation=1.0))
    _, (line,) = with_class_of_prior(settings, job.plan, "sks")
    assert line == "prior preservation: weight 1, 'woman' for 'sks' (as set)"
    first, *others = job.plan.examples
    some = replace(job.plan, examples=[first, *(replace(example, caption="smile, tree") for example in others)])
    _, (line,) = with_class_of_prior(settings, some, "sks")
    assert line.endswith("(as set); not for 2 of 3 images, whose captions lack the trigger word")
    none = replace(job.plan, examples=[replace(example, caption="a sksy tree") for example in job.plan.examples])
    with pytest.raises(SettingsError, match=r"no caption has the trigger word.*write sks into the captions, or set PRIOR_PRES"):
        with_class_of_prior(settings, none, "sks")


def test_a_thumbnail_is_a_small_jpeg_in_the_text(tmp_path):
    assert thumbnail(None) == thumbnail(tmp_path / "gone.png") == {}
    Image.new("RGB", (1024, 512), "red").save(tmp_path / "sample.png")
    kind, _, content = thumbnail(tmp_path / "sample.png")["modelspec.thumbnail"].partition(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        assert (image.format, image.size) == ("JPEG", (256, 128))


def test_regularization_that_is_off_is_off_in_the_resolved_file(stage, capsys):
    (stage.dataset / "regularization" / "1_woman").mkdir(parents=True)
    stage.add("coffee", "../regularization/1_woman/a.png", None)
    job = job_of(stage, prior_weight=0.0)
    prepare_outputs(job)
    assert tomllib.loads(job.outputs.resolved_config.read_text())["train"]["data"]["prior_weight"] == 0
    assert job.plan.regularization == []
    assert not any(step.regularization for step in job.plan.order)
    assert "regularization: off (PRIOR_WEIGHT=0); 1 images" in capsys.readouterr().out
