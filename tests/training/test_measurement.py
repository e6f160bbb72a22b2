"""A base model that says nothing about its prediction type is measured, and the run is planned with what was found."""

import shutil
import tomllib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.project import ProjectSettings
from training.config import DataSettings
from training.data.cache import image_pixels
from training.data.dataset import read_images
from training.models.base_model import base_digest, find_base, remember_prediction
from training.models.weights import load_vae
from training.plan import at_each_resolution, placements_of

SHORT = {"LORA_TARGETS": "attention", "SAVE_EVERY_EPOCHS": 0, "NUM_TRAIN_STEPS": 1}


def change_weights(path, change) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


@pytest.fixture
def unmarked_v(stage):
    """A base model that predicts v, and whose scheduler says epsilon, as a converter writes it: with latents of mean 0 and variance
    1, the best prediction of v that knows nothing else is 0."""
    for photograph in ("astronaut", "coffee", "chelsea"):
        stage.add(photograph)
    folder = stage.models / "unmarked"
    shutil.copytree(stage.base, folder)
    vae, data = load_vae(find_base(str(folder), stage.models), torch.device("cpu")), DataSettings(resolution=64)
    found, _ = read_images(ProjectSettings("sks", stage.dataset, stage.output, stage.models), data)
    examples = at_each_resolution(found, data)
    images = zip(examples, placements_of(examples, data), strict=True)
    with torch.no_grad():
        means = [vae.encode(image_pixels(*image)[None]).latent_dist.mean[0].flatten(1) for image in images]
    latents = torch.cat(means, 1)

    def standardize(weights: dict[str, torch.Tensor]) -> None:
        size = vae.config.scaling_factor * latents.std(1)
        weights["quant_conv.weight"][:4] /= size[:, None, None, None]
        weights["quant_conv.bias"][:4] = (weights["quant_conv.bias"][:4] - latents.mean(1)) / size

    def predict_zero(weights: dict[str, torch.Tensor]) -> None:
        weights["conv_out.weight"].zero_()
        weights["conv_out.bias"].zero_()

    change_weights(folder / "vae" / "diffusion_pytorch_model.safetensors", standardize)
    change_weights(folder / "unet" / "diffusion_pytorch_model.safetensors", predict_zero)
    stage.variables["BASE_MODEL"] = folder
    return stage


@pytest.mark.long
def test_an_unmarked_v_prediction_model_is_trained_as_one(unmarked_v):
    stage = unmarked_v
    assert "; epsilon, which the first run measures\n" in stage.run("--check").stdout
    said = stage.trained(**SHORT)
    assert "\nprediction type: v_prediction" in said
    assert "(measured with 3 images); the base model's files do not say so, and the run is planned again\n" in said
    train = tomllib.loads((stage.output / "lora" / "training_config_resolved.toml").read_text())["train"]
    assert train["model"]["prediction_type"] == "v_prediction"
    assert (train["objective"]["min_snr_gamma"], train["objective"]["noise_offset"]) == (0.0, 0.0)
    with safe_open(stage.lora, "np") as file:
        assert file.metadata()["modelspec.prediction_type"] == "v"
    assert "; v_prediction" in stage.run("--check").stdout

    again = stage.trained(**SHORT)
    assert "nothing to do" in again
    assert "measured" not in again
    shutil.rmtree(stage.output / "cache")  # what was decided is in the checkpoint as well
    assert "nothing to do" in stage.trained(**SHORT)
    extended = stage.trained(**SHORT | {"NUM_TRAIN_STEPS": 2})
    assert "continuing at step 1" in extended
    assert "measured" not in extended


def test_a_prediction_type_that_is_set_is_not_measured(unmarked_v):
    said = unmarked_v.trained(**SHORT, PREDICTION_TYPE="epsilon")
    assert "measured" not in said
    train = tomllib.loads((unmarked_v.output / "lora" / "training_config_resolved.toml").read_text())["train"]
    assert train["model"]["prediction_type"] == "epsilon"


def test_a_rectified_flow_is_refused_with_one_line(stage):
    """Its measurement is tested with an exact network."""
    stage.add("astronaut")
    base, cache = find_base(str(stage.base), stage.models), stage.output / "cache"
    remember_prediction(cache, base_digest(base, cache, "unet"), "flow", zero_terminal_snr=False)
    for flags in ((), ("--check",)):
        refused = stage.run(*flags, **SHORT)
        assert refused.returncode == 5
        assert "is a rectified-flow model, as its predictions show" in refused.stderr
    assert "measured" not in stage.trained(**SHORT, PREDICTION_TYPE="epsilon")
