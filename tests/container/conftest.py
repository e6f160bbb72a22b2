"""The image, built once on BASE_IMAGE; clones of the repository to run it in; a stand-in ComfyUI that containers can reach."""

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from container_clone import BASE_IMAGE, IMAGE, NAMED_IMAGES, OTHER_BASE, OTHER_IMAGE, OWNER, Clone, docker

from common.settings import REPOSITORY
from demo.standin_comfyui.server import StandIn


@pytest.fixture(scope="session")
def template(tmp_path_factory) -> Path:
    """The files that every clone is a copy of: those of the repository that the image and Compose use."""
    folder = tmp_path_factory.mktemp("template")
    names = ("Dockerfile", ".dockerignore", "docker-compose.yml", "requirements.txt", "workflow_api.json", "prompts_example.json")
    for name in names:
        shutil.copy2(REPOSITORY / name, folder)
    for name in ("config", "container", "scripts"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "test.yml").write_text(NAMED_IMAGES, encoding="utf-8")
    for name in ("dataset/images", "output/lora", "models"):
        (folder / name).mkdir(parents=True)
    return folder


@pytest.fixture(scope="session")
def demo_environment(tmp_path_factory):
    """The demo environment."""
    from demo.environment import DemoEnvironment  # imports diffusers, which takes seconds; other tests need not wait for it

    return DemoEnvironment.build(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="session")
def image(template) -> Iterator[str]:
    """The image, built on BASE_IMAGE and removed after the tests."""
    assert BASE_IMAGE, "BASE_IMAGE is not set: make container-test BASE_IMAGE=..."
    built = Clone(template).build()
    assert built.returncode == 0, built.stdout
    yield IMAGE
    subprocess.run(**Clone(template).compose("down", "--remove-orphans"))
    docker("image", "rm", "--force", IMAGE)


@pytest.fixture
def copy(template, tmp_path) -> Path:
    """A copy of the clone's files."""
    folder = shutil.copytree(template, tmp_path / "loracat")
    folder.chmod(0o755)  # as git creates it; pytest's folders are closed to other users
    return folder


@pytest.fixture
def unbuilt(copy) -> Iterator[Clone]:
    """A clone to build another image from, also on another base; both images are removed afterwards."""
    yield Clone(copy, OTHER_IMAGE)
    docker("image", "rm", "--force", OTHER_IMAGE, OTHER_BASE, check=False)


@pytest.fixture
def clone(image, copy, demo_environment, comfyui) -> Clone:
    """A clone that belongs to OWNER, with the demo's models, workflow, prompts and face in the places that README.md names."""
    for name, target in {
        "workflow.json": "workflow_api.json",
        "workflow_config.json": "config/workflow_config.json",
        "prompts.json": "prompts.json",
        "face.png": "face_reference.png",
    }.items():
        shutil.copy2(demo_environment.folder / name, copy / target)
    shutil.copytree(demo_environment.models, copy / "models", dirs_exist_ok=True)
    settings = replace(demo_environment, folder=Path("/app")).environment(
        f"http://host.docker.internal:{comfyui.url.rpartition(':')[2]}"
    )
    made = Clone(copy, variables={name: value for name, value in settings.items() if not value.startswith("/app")})
    made.give_to(OWNER)
    return made


@pytest.fixture(scope="session")
def address_for_containers(image) -> str:
    """The address of this machine that is host.docker.internal in containers."""
    asked = docker("run", "--rm", "--add-host", "this:host-gateway", "--entrypoint", "getent", image, "ahostsv4", "this")
    return asked.split()[0]


@pytest.fixture
def comfyui(tmp_path, address_for_containers) -> Iterator[StandIn]:
    """A stand-in ComfyUI that containers can reach."""
    with StandIn(tmp_path / "comfyui", host=address_for_containers) as standin:
        yield standin
