"""`train_lora.py --check`: what it says of a machine, a base model and pictures, and what it complains about."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import skimage.data

from settings import REPOSITORY
from training.doctor import driver_version, has_code_for

PHOTOGRAPH = Path(skimage.data.__file__).parent / "astronaut.png"
OF_2_10 = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((12, 1), OF_2_10, True),  # GB10 runs sm_120's code
        ((8, 9), OF_2_10, True),
        ((9, 0), ("sm_80", "compute_80"), True),  # compiled by the driver from PTX
        ((9, 0), ("sm_80",), False),
        ((7, 5), OF_2_10, False),
        ((12, 0), ("sm_121",), False),
        ((9, 0), ("sm_90a",), True),
        ((12, 1), ("sm_120a",), False),
        ((12, 1), ("sm_120f",), True),
        ((10, 3), ("compute_100f",), True),
        ((12, 1), ("compute_100f",), False),
        ((12, 1), (), False),
    ],
)
def test_code_for_a_gpu(capability, built_for, runs):
    assert has_code_for(capability, built_for) == runs


def test_driver_version_is_read_from_the_kernel_module(tmp_path, monkeypatch):
    file = tmp_path / "version"
    monkeypatch.setattr("training.doctor.DRIVER_FILE", file)
    assert driver_version() == "of unknown version"
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  580.95.05  Release Build  (b@h)\nGCC version: 13.3.0\n"
    )
    assert driver_version() == "580.95.05"


@pytest.fixture
def check(tmp_path, tiny_sdxl):
    """Run the stage with `--check` on a workspace that has the tiny base model and no pictures."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(tiny_sdxl)
    variables = {"DATASET_DIR": "dataset", "OUTPUT_DIR": "output", "MODELS_DIR": "models", "BASE_MODEL": "tiny"}

    def run(flag: str, **more: str) -> subprocess.CompletedProcess:
        command = [sys.executable, REPOSITORY / "scripts" / "train_lora.py", flag]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", **variables, **more}
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)

    return run


def test_everything_that_is_wrong_comes_in_one_list(check):
    told = check("--check", BASE_MODEL="absent")
    assert told.returncode == 5
    assert "absent" in told.stderr
    assert "no pictures" in told.stderr
    assert "Traceback" not in told.stderr


def test_pictures_that_earlier_stages_bring_need_not_be_there(check, tmp_path):
    told = check("--check=ahead")
    assert told.returncode == 0, told.stderr
    assert "0 pictures so far" in told.stdout
    for words in ("torch ", "GiB of memory", "GiB are free", "base model"):
        assert words in told.stdout
    assert not (tmp_path / "output").exists()


def test_what_a_run_takes_is_said_when_the_pictures_are_there(check, tmp_path):
    images = tmp_path / "dataset" / "images"
    images.mkdir(parents=True)
    shutil.copy(PHOTOGRAPH, images)
    assert "1 without a caption" in check("--check=ahead").stdout
    (images / "astronaut.txt").write_text("a woman")
    told = check("--check")
    assert told.returncode == 0, told.stderr
    assert "20 image-steps are few" in told.stdout
