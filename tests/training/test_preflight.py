"""`train_lora.py --check`: its report on GPU, base model and images, and the problems that it lists."""

import os

import pytest

from training.preflight import check_processor, driver_version, has_code_for

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
def test_which_architectures_run_on_a_gpu(capability, built_for, runs):
    assert has_code_for(capability, built_for) == runs


def test_driver_version_is_read_from_the_kernel_module(tmp_path, monkeypatch):
    file = tmp_path / "version"
    monkeypatch.setattr("training.preflight.DRIVER_FILE", file)
    assert driver_version() == "of unknown version"
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  580.95.05  Release Build  (b@h)\nGCC version: 13.3.0\n"
    )
    assert driver_version() == "580.95.05"


@pytest.mark.parametrize(("in_container", "reason"), [(True, "loracat-cpu cannot"), (False, "run nvidia-smi once")])
def test_a_driver_without_devices_is_explained(tmp_path, monkeypatch, in_container, reason):
    """The same variable that decides about commands says whether this is a container."""
    (tmp_path / "version").touch()
    monkeypatch.setattr("training.preflight.DRIVER_FILE", tmp_path / "version")
    monkeypatch.setattr("training.preflight.DEVICE_FILES", ())
    monkeypatch.setattr("training.preflight.IN_CONTAINER", in_container)
    assert reason in check_processor()


def test_all_problems_are_in_one_list(stage):
    checked = stage.run("--check", BASE_MODEL="absent")
    assert checked.returncode == 5
    assert "absent" in checked.stderr
    assert "no images" in checked.stderr


def test_images_may_be_missing_while_earlier_stages_have_to_run(stage):
    checked = stage.run("--check=ahead")
    assert checked.returncode == 0, checked.stderr
    assert "images: 0 so far" in checked.stdout
    for words in ("torch ", "memory: ", "GiB available", "disk: ", "GiB free", "base model: "):
        assert words in checked.stdout
    assert not stage.output.exists()


def test_the_run_is_described_when_all_images_have_captions(stage):
    image = stage.add("astronaut", caption=None)
    assert "1 without a caption" in stage.run("--check=ahead").stdout
    image.with_suffix(".txt").write_text("a woman")
    checked = stage.run("--check", NUM_TRAIN_EPOCHS=20)
    assert checked.returncode == 0, checked.stderr
    assert "20 training samples are few" in checked.stdout


def test_a_check_lists_the_images_only_a_few_times(stage, monkeypatch):
    """Each list takes a second where there are 20,000 images."""
    stage.add("astronaut")
    listed = []
    for name in ("scandir", "listdir"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda path=".", original=original: (listed.append(str(path)), original(path))[1])
    assert stage.run("--check").returncode == 0
    assert listed.count(str(stage.images)) <= 10
