"""The image: what it adds to its base image, what it leaves unchanged, and what it must not contain."""

import json

import pytest
from container_clone import BASE_IMAGE, OTHER_BASE, OTHER_IMAGE, Clone, docker, in_image

from common.settings import REPOSITORY

pytestmark = [pytest.mark.container, pytest.mark.timeout(1800)]

BASE_PACKAGES = ("torch", "torchvision", "torchaudio", "triton", "pytorch-triton", "numpy", "flash-attn", "flash_attn")
MOST_ADDED_BYTES = 1_500_000_000
SECRET = "a-secret-of-the-user"
REQUIRED = "import re; print(*(re.split('[=<>]', line)[0] for line in open('/opt/loracat/requirements.txt') if line[:1].isalnum()))"


def packages(image: str) -> dict[str, str]:
    """Name -> version of the Python packages in an image."""
    listed = in_image(image, "python3", "-m", "pip", "list", "--format=json", "--disable-pip-version-check")
    return {package["name"].lower(): package["version"] for package in json.loads(listed.splitlines()[-1])}


def layers(image: str) -> list[str]:
    return json.loads(docker("image", "inspect", image, "--format", "{{json .RootFS.Layers}}"))


def size_bytes(image: str) -> int:
    return int(docker("image", "inspect", image, "--format", "{{.Size}}"))


def is_unchanged(base: str, image: str) -> bool:
    before, after = packages(base), packages(image)
    assert "torch" in before
    return all(before.get(name) == after.get(name) for name in BASE_PACKAGES)


def test_packages_of_the_base_image_are_unchanged(image):
    assert is_unchanged(BASE_IMAGE, image)


def test_pip_check_finds_no_conflict_in_the_added_packages(image):
    added = in_image(image, "python3", "-c", REQUIRED).lower().split()
    assert "diffusers" in added
    check = docker("run", "--rm", "--entrypoint", "python3", image, "-m", "pip", "check", check=False)
    assert not [line for line in check.lower().splitlines() if line.split()[0] in added]


FACE_MODEL = """
import sys
sys.path.insert(0, "/app/scripts")
import numpy, pathlib, common.faces
model = common.faces.load_face_model("dlib", pathlib.Path("/app/models"))
assert model.detect(numpy.zeros((200, 200, 3), numpy.uint8)) == []
"""


def test_the_default_face_model_loads_and_the_other_one_names_what_it_needs(image):
    in_image(image, "python3", "-c", FACE_MODEL)
    import_cv2, load_sface = "import cv2; print('imported')", FACE_MODEL.replace('"dlib"', '"sface"')
    in_python = ("run", "--rm", "--entrypoint", "python3", image, "-c")
    has_opencv = "imported" in docker(*in_python, import_cv2, check=False)  # the base image may have one
    remedy = "add opencv-python-headless to requirements.txt, if it is not there, and run: docker compose build"
    assert ("MissingWeightsError" if has_opencv else remedy) in docker(*in_python, load_sface, check=False)


def test_opencv_can_be_added(unbuilt):
    """For FACE_MODEL=sface; it needs numpy 2."""
    listed = (REPOSITORY / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    (opencv,) = [line for line in listed if line.startswith("opencv")]
    if packages(BASE_IMAGE)["numpy"].startswith("1."):
        pytest.skip("the base image has numpy 1")
    requirements = unbuilt.folder / "requirements.txt"
    requirements.write_text(f"{requirements.read_text(encoding='utf-8')}{opencv}\n", encoding="utf-8")
    built = unbuilt.build()
    assert built.returncode == 0, built.stdout
    in_image(OTHER_IMAGE, "python3", "-c", "import cv2; cv2.FaceDetectorYN, cv2.FaceRecognizerSF")


def test_base_image_without_nvidias_entrypoint_works(image):
    output = docker("run", "--rm", "--volume", "/dev/null:/opt/nvidia/nvidia_entrypoint.sh", image, "--help")
    assert output.startswith("Usage: run.sh")


def test_image_adds_little_to_its_base(image):
    assert size_bytes(image) - size_bytes(BASE_IMAGE) < MOST_ADDED_BYTES


def test_no_file_of_the_user_gets_into_the_image(image, unbuilt):
    folder = unbuilt.folder
    planted = (".env", "face_reference.png", "prompts.json", "models/base.safetensors", "dataset/images/me.png", "notes.txt")
    planted += ("output/lora/me.safetensors", ".git/config", ".venv/bin/python", "scripts/__pycache__/settings.cpython-312.pyc")
    for name in planted:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(SECRET, encoding="utf-8")
    built = unbuilt.build(WANDB_API_KEY=SECRET)
    assert built.returncode == 0, built.stdout
    searched = docker(
        "run", "--rm", "--entrypoint", "grep", OTHER_IMAGE, "-rsl", SECRET, "/app", "/opt", "/root", "/tmp", check=False
    )
    assert searched == ""
    assert SECRET not in docker("image", "inspect", OTHER_IMAGE) + docker("history", "--no-trunc", OTHER_IMAGE)
    files = in_image(OTHER_IMAGE, "find", "/app", "-type", "f").split()
    expected = {f"/app/{name}" for name in Clone(folder).files("config", "scripts") if "__pycache__" not in name}
    assert set(files) == expected | {"/app/workflow_api.json", "/app/prompts_example.json"}
    assert in_image(OTHER_IMAGE, "find", "/root", "/tmp", "-type", "f", "-size", "+1M") == ""


def test_changing_a_script_does_not_reinstall_packages(image, unbuilt):
    before = layers(image)
    script = unbuilt.folder / "scripts" / "run.sh"
    script.write_text(script.read_text(encoding="utf-8") + "# changed\n", encoding="utf-8")
    assert unbuilt.build().returncode == 0
    after = layers(OTHER_IMAGE)
    assert after != before
    common = sum(one == other for one, other in zip(before, after, strict=True))
    assert common >= len(layers(BASE_IMAGE)) + 2, "requirements.txt and the packages are the two layers after the base image's"


CONSTRAINTS = {
    "full": (
        "pip list --format=freeze | grep -vE '^(pip|setuptools|wheel)=' >/etc/pip/constraint.txt;"
        " printf '%s\\n' huggingface_hub==0.30.2 transformers==4.51.0 Pillow==11.1.0 >>/etc/pip/constraint.txt;"
        " pip install --no-deps torchao==0.9.0"
    ),
    "empty": ": >/etc/pip/constraint.txt",
}


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_base_image_with_a_constraint_file(unbuilt, constraint):
    """NVIDIA's images have one: full in some releases, together with an old torchao, and empty in others."""
    base = derived_base(unbuilt, f"RUN mkdir -p /etc/pip; {CONSTRAINTS[constraint]}\nENV PIP_CONSTRAINT=/etc/pip/constraint.txt")
    built = unbuilt.build(base)
    assert built.returncode == 0, built.stdout
    assert is_unchanged(base, OTHER_IMAGE)
    assert "torchao" not in packages(OTHER_IMAGE)
    in_image(OTHER_IMAGE, "python3", "-c", PEFT_LORA)


PEFT_LORA = """
import peft, torch
model = torch.nn.Sequential(torch.nn.Linear(4, 4))
peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0"]), model)
"""


def test_base_image_without_torch_is_refused(unbuilt):
    base = derived_base(unbuilt, "RUN pip uninstall --yes torch")
    built = unbuilt.build(base)
    assert built.returncode != 0
    assert "BASE_IMAGE has no torch" in built.stdout


def test_requirement_that_would_replace_torch_fails_the_build(unbuilt):
    requirements = unbuilt.folder / "requirements.txt"
    requirements.write_text(requirements.read_text(encoding="utf-8") + "torch==2.4.1\n", encoding="utf-8")
    built = unbuilt.build()
    assert built.returncode != 0
    assert "torch" in built.stdout.splitlines()[-1] or "conflict" in built.stdout.lower()


def derived_base(clone: Clone, instructions: str) -> str:
    """An image built from BASE_IMAGE with `instructions`, for one test."""
    folder = clone.folder.parent / "base"
    folder.mkdir()
    (folder / "Dockerfile").write_text(f"FROM {BASE_IMAGE}\n{instructions}\n", encoding="utf-8")
    docker("build", "--tag", OTHER_BASE, str(folder))
    return OTHER_BASE
