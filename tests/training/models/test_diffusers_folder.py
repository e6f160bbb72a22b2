"""Base models in diffusers' layout: which files are read, and which folders are refused."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
from base_models import all_components, assert_same_weights, change_json, refusal
from safetensors.torch import load_file, save_file

from training.models.base_model import find_base
from training.models.sdxl import WEIGHT_STEMS, Schedule


def test_fp16_files_and_shards_are_accepted(folder, tiny_sdxl):
    whole = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    names = sorted(whole)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    shards = ["diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model-00002-of-00002.safetensors"]
    for shard, part in zip(shards, (names[:900], names[900:]), strict=True):
        save_file({name: whole[name] for name in part}, folder / "unet" / shard)
    index = {"weight_map": {name: shards[position >= 900] for position, name in enumerate(names)}}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    for part in ("vae", "text_encoder", "text_encoder_2"):
        (folder / part / f"{WEIGHT_STEMS[part]}.safetensors").rename(folder / part / f"{WEIGHT_STEMS[part]}.fp16.safetensors")
    ours = all_components(find_base(str(folder), folder))
    for name, module in all_components(find_base(str(tiny_sdxl), tiny_sdxl)).items():
        assert_same_weights(module, ours[name])
    (folder / "unet" / shards[1]).unlink()
    assert f"unet/{shards[1]} is missing" in refusal(folder, folder)
    change_json(folder / "unet" / "diffusion_pytorch_model.safetensors.index.json", weight_map={})
    assert "unet/diffusion_pytorch_model.safetensors.index.json lists no files" in refusal(folder, folder)


def test_full_precision_is_preferred_to_fp16(folder):
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: weight.float() for name, weight in load_file(file).items()}, file.with_suffix(".fp16.safetensors"))
    (base_file,) = find_base(str(folder), folder).components["vae"].files
    assert base_file.path == file


def test_schedule_of_a_folder(folder):
    change_json(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert find_base(str(folder), folder).schedule == Schedule("v_prediction", zero_terminal_snr=True)


def test_everything_wrong_with_a_folder_is_reported_at_once(folder):
    (folder / "model_index.json").unlink()
    shutil.rmtree(folder / "text_encoder_2")
    (folder / "tokenizer" / "merges.txt").unlink()
    (folder / "tokenizer_2" / "vocab.json").write_text("{")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(folder / "vae" / "diffusion_pytorch_model.bin")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with (folder / "text_encoder" / "model.safetensors").open("r+b") as file:
        file.truncate(10_000)
    message = refusal(folder, folder)
    for problem in (
        "model_index.json is missing",
        "text_encoder_2/config.json is missing",
        "text_encoder_2/model.safetensors is missing",
        "tokenizer/: a tokenizer's files are missing or damaged",
        "tokenizer_2/: a tokenizer's files are missing or damaged",
        "there is only diffusion_pytorch_model.bin, a pickle",
        "is a Git LFS pointer",
        "is damaged, it has 10000 bytes",
    ):
        assert problem in message


@pytest.mark.parametrize(
    ("file", "changes", "problem"),
    [
        ("unet/config.json", {"cross_attention_dim": 768}, "is an SD 1.5 model"),
        ("unet/config.json", {"cross_attention_dim": 1024}, "is an SD 2.x model"),
        ("unet/config.json", {"cross_attention_dim": 1280}, "is the SDXL refiner"),
        ("unet/config.json", {"in_channels": 9}, "is an inpainting model (9 input channels)"),
        ("unet/config.json", {"transformer_layers_per_block": [0, 2, 4]}, "other blocks than SDXL's"),
        ("unet/config.json", {"cross_attention_dim": 100}, "expects text embeddings of 100 channels"),
        ("model_index.json", {"_class_name": "FluxPipeline"}, "another family (FluxPipeline)"),
        ("scheduler/scheduler_config.json", {"_class_name": "EDMDPMSolverMultistepScheduler"}, "is an EDM model"),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "is a flow-matching model"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type sample"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "squaredcos_cap_v2"}, "another noise schedule"),
        ("vae/config.json", {"latents_mean": [0, 0, 0, 0]}, "is an EDM model"),
    ],
)
def test_folders_of_other_models(folder, file, changes, problem):
    change_json(folder / file, **changes)
    assert problem in refusal(folder, folder)


def test_sd_1_5_folder_is_named_instead_of_what_it_lacks(folder):
    change_json(folder / "model_index.json", _class_name="StableDiffusionPipeline")
    change_json(folder / "unet" / "config.json", cross_attention_dim=768)
    shutil.rmtree(folder / "text_encoder_2")
    message = refusal(folder, folder)
    assert "is an SD 1.5 model" in message
    assert "missing" not in message


def test_folder_with_a_single_file_in_it(tmp_path):
    assert "is not a diffusers folder" in refusal(tmp_path, tmp_path)
    (tmp_path / "sdxl").mkdir()
    (tmp_path / "sdxl" / "model.safetensors").touch()
    assert f"set BASE_MODEL to a file in it: {tmp_path}/sdxl/model.safetensors" in refusal(Path("sdxl"), tmp_path)


@pytest.mark.parametrize(
    ("file", "changes", "problem"),
    [
        ("vae/config.json", {"scaling_factor": None}, "scaling_factor must be a number above 0; SDXL's is 0.13025"),
        ("vae/config.json", {"scaling_factor": "x"}, "scaling_factor must be a number"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": None}, "num_train_timesteps must be a whole number"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}, "num_train_timesteps must be a whole number"),
        ("scheduler/scheduler_config.json", {"beta_start": "x"}, "beta_start must be a number between 0 and 1"),
        ("scheduler/scheduler_config.json", {"beta_end": -1.0}, "beta_end must be a number between 0 and 1"),
        ("vae/config.json", {"scaling_factor": math.inf}, "scaling_factor must be a number"),
        ("vae/config.json", {"scaling_factor": 10**400}, "scaling_factor must be a number"),
        ("vae/config.json", {"layers_per_block": 10**8}, "vae/config.json: layers_per_block does not fit the weights"),
        ("unet/config.json", {"layers_per_block": [2, 2, 10**8]}, "unet/config.json: layers_per_block does not fit the weights"),
        ("unet/config.json", {"reverse_transformer_layers_per_block": [[10**8]]}, "per_block does not fit the weights"),
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers does not fit the weights"),
        ("text_encoder_2/config.json", {"num_hidden_layers": -1}, "num_hidden_layers does not fit the weights"),
        ("text_encoder/config.json", {"max_position_embeddings": 10**10}, "max_position_embeddings does not fit the weights"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}, "num_train_timesteps must be a whole number"),
        (
            "text_encoder/config.json",
            {"hidden_size": "32"},
            "96 channels, the text encoders produce ['32', 64]",
        ),
    ],
)
def test_invalid_numbers_are_named(folder, file, changes, problem):
    change_json(folder / file, **changes)
    assert problem in refusal(folder, folder.parent)


def test_an_index_that_is_a_list_lists_no_files(folder):
    stem = WEIGHT_STEMS["unet"]
    (folder / "unet" / f"{stem}.safetensors").unlink()
    (folder / "unet" / f"{stem}.safetensors.index.json").write_text('{"weight_map": [1]}')
    assert f"unet/{stem}.safetensors.index.json lists no files" in refusal(folder, folder.parent)


@pytest.mark.parametrize("name", ["x\0y.safetensors", "", "..", "n" * 300])
def test_an_index_with_impossible_names(folder, name):
    stem = WEIGHT_STEMS["unet"]
    (folder / "unet" / f"{stem}.safetensors").unlink()
    (folder / "unet" / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))
    assert "  - unet/" in refusal(folder, folder.parent)


def test_what_is_not_a_file_is_not_read(folder):
    config, weights = folder / "unet" / "config.json", folder / "vae" / f"{WEIGHT_STEMS['vae']}.safetensors"
    for path in (config, weights, folder / "vae" / "config.json"):
        path.unlink()
    os.mkfifo(config)
    weights.symlink_to(weights)
    (folder / "vae" / "config.json").mkdir()
    message = refusal(folder, folder.parent)
    assert "unet/config.json is not a file" in message
    assert "vae/config.json is not a file" in message
    assert f"vae/{weights.name} cannot be read: Too many levels of symbolic links" in message


def test_a_tokenizer_with_a_truncated_merges_file_is_damaged(folder):
    merges = folder / "tokenizer" / "merges.txt"
    merges.write_text("".join(line + "\n" for line in merges.read_text().splitlines()[:-1]))
    assert "tokenizer/: a tokenizer's files are missing or damaged" in refusal(folder, folder.parent)
