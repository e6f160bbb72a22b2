"""What the tests of base models share."""

import json
from pathlib import Path

import pytest
import torch

from common.errors import ModelError
from training.models.base_model import find_base
from training.models.weights import load_text_encoders, load_unet, load_vae

CPU = torch.device("cpu")


def refusal(path: Path, models_dir: Path) -> str:
    """The error message for the base model at `path`."""
    with pytest.raises(ModelError) as caught:
        find_base(str(path), models_dir)
    assert caught.value.exit_code == 5
    assert "hf download stabilityai/stable-diffusion-xl-base-1.0 --local-dir" in str(caught.value)
    return str(caught.value)


def change_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def all_components(base) -> dict[str, torch.nn.Module]:
    first, second = load_text_encoders(base, CPU, torch.float32)
    return {
        "unet": load_unet(base, CPU, torch.float32),
        "vae": load_vae(base, CPU),
        "text_encoder": first,
        "text_encoder_2": second,
    }


def assert_same_weights(first: torch.nn.Module, second: torch.nn.Module) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
