"""The image, built once on BASE_IMAGE; clones of the repository to run it in; a ComfyUI that containers reach."""

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
    """What every clone is a copy of: the files of the repository, with the demo environment's files in the users' places."""
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
def miniature(tmp_path_factory):
    """the demo environment."""
    from demo.environment import DemoEnvironment  # diffusers takes seconds to import, which the other tests need not wait for

    return DemoEnvironment.build(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def image(template) -> Iterator[str]:
    """The image, built on BASE_IMAGE; gone when the tests are done."""
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
    folder.chmod(0o755)  # as git makes it; pytest's folders are closed to others
    return folder


@pytest.fixture
def unbuilt(copy) -> Iterator[Clone]:
    """A clone to build another image from, with another base if need be; both are gone afterwards."""
    yield Clone(copy, OTHER_IMAGE)
    docker("image", "rm", "--force", OTHER_IMAGE, OTHER_BASE, check=False)


@pytest.fixture
def clone(image, copy, miniature, comfyui) -> Clone:
    """A clone of OWNER's with models, workflow, prompts and face in the places where the README has them."""
    for name, place in {
        "workflow.json": "workflow_api.json",
        "workflow_config.json": "config/workflow_config.json",
        "prompts.json": "prompts.json",
        "face.png": "face_reference.png",
    }.items():
        shutil.copy2(miniature.folder / name, copy / place)
    shutil.copytree(miniature.models, copy / "models", dirs_exist_ok=True)
    settings = replace(miniature, folder=Path("/app")).environment(f"http://host.docker.internal:{comfyui.url.rpartition(':')[2]}")
    made = Clone(copy, variables={name: value for name, value in settings.items() if not value.startswith("/app")})
    made.give_to(OWNER)
    return made


@pytest.fixture(scope="session")
def address_for_containers(image) -> str:
    """The address of this machine that containers know as host.docker.internal."""
    asked = docker("run", "--rm", "--add-host", "this:host-gateway", "--entrypoint", "getent", image, "ahostsv4", "this")
    return asked.split()[0]


@pytest.fixture
def comfyui(tmp_path, address_for_containers) -> Iterator[StandIn]:
    """A stand-in ComfyUI that containers reach."""
    with StandIn(tmp_path / "comfyui", host=address_for_containers) as standin:
        yield standin
