"""Families of base models as real files name them."""

import json
from pathlib import Path

import pytest

from common.weights import WeightsFile
from training.callbacks.sample_prompts import sample_prompts
from training.config import SampleSettings
from training.models.family import family_of
from training.models.sdxl import BaseModel, Component, Schedule

BOORU, SCORE = "masterpiece, best quality", "score_9, score_8_up, score_7_up"


def base(name: str, metadata: dict[str, str] | None = None, **config: str) -> BaseModel:
    path = Path("/models") / name
    file = WeightsFile(path, {}, metadata or {})
    unet = Component("unet", config, (file,), in_single_file=metadata is not None)
    return BaseModel(path, {"unet": unet}, Schedule())


@pytest.mark.parametrize(
    ("name", "family", "tags"),
    [
        ("NoobAI-XL-Vpred-v1.0", "NoobAI", BOORU),
        ("noobaiXLNAIXL_vPred10Version", "NoobAI", BOORU),
        ("Illustrious-XL-v0.1", "Illustrious", BOORU),
        ("waiIllustriousSDXL_v150", "Illustrious", BOORU),
        ("novaAnimeXL_ilV120", "Illustrious", BOORU),
        ("ponyDiffusionV6XL_v6StartWithThisOne", "Pony", SCORE),
        ("autismmixSDXL_autismmixPony", "Pony", SCORE),
        ("sd_xl_base_1.0", "SDXL 1.0", ""),
        ("stable-diffusion-xl-base-1.0", "SDXL 1.0", ""),
        ("hassakuXLPony_and_Illustrious", "a merge of Illustrious and Pony", BOORU),
    ],
)
def test_the_name_tells_the_family(name, family, tags):
    found = family_of(base(name))
    assert (str(found), found.quality_tags) == (f"{family} (by its name)", tags)


@pytest.mark.parametrize("name", ["juggernautXL_v9", "ponytailMix", "dreamshaperXL", "Silverado", "willow", "oil_painting"])
def test_other_names_tell_nothing(name):
    found = family_of(base(name))
    assert (str(found), found.quality_tags) == ("family not known", "")


MERGER = {"ab12": {"name": "illustriousXL_v01"}, "cd34": {"name": "ponyDiffusionV6XL"}}
WORKFLOW = {"3": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "anime\\NoobAI-XL-v1.1.safetensors"}}}
WORKFLOW["7"] = {"class_type": "CLIPTextEncode", "inputs": {"text": "a pony in illustrious light"}}


@pytest.mark.parametrize(
    ("metadata", "family"),
    [
        ({"modelspec.title": "Stable Diffusion XL 1.0 Base"}, "SDXL 1.0 (by modelspec.title in its metadata)"),
        ({"modelspec.title": "Illustrious XL 2.0"}, "Illustrious (by modelspec.title in its metadata)"),
        (
            {"format": "webui", "sd_merge_models": json.dumps(MERGER)},
            "a merge of Illustrious and Pony (by sd_merge_models in its metadata)",
        ),
        ({"prompt": json.dumps(WORKFLOW)}, "NoobAI (by the workflow in its metadata)"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base", "format": "pt"}, "family not known"),
        ({"ss_tag_frequency": '{"pony": 3}'}, "family not known"),
    ],
)
def test_metadata_tell_the_family_of_a_file_with_another_name(metadata, family):
    assert str(family_of(base("myMix_v3", metadata))) == family


def test_the_configuration_of_a_folder_tells_where_it_is_from():
    found = family_of(base("mine", _name_or_path="Laxhar/noobai-XL-1.0/unet"))
    assert str(found) == "NoobAI (by _name_or_path in unet/config.json)"


def test_default_prompts_begin_with_the_tags_of_the_family_and_those_of_a_user_do_not():
    captions = {"sks": ["sks, 1girl, smile"]}
    plain = sample_prompts(SampleSettings(), captions, {})
    pony = sample_prompts(SampleSettings(), captions, {}, SCORE)
    assert [prompt.text for prompt in pony] == [f"{SCORE}, {prompt.text}" for prompt in plain]
    assert [prompt.kind for prompt in pony] == [prompt.kind for prompt in plain]
    own = SampleSettings(sample_prompts="sks, a car")
    assert sample_prompts(own, captions, {}, SCORE) == sample_prompts(own, captions, {})
