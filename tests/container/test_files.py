"""Dockerfile, .dockerignore and docker-compose.yml, checked without a Docker engine."""

import re

import yaml

from common.settings import REPOSITORY

MOUNTED = ("dataset", "output", "models")
GPU_ONLY_KEYS = {"deploy", "ulimits"}
KEYS_OF_BOTH_COMPOSE_VERSIONS = {"image", "build", "volumes", "extra_hosts", "shm_size", "init", "stop_grace_period", "environment"}


def lines(name: str) -> list[str]:
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def services() -> dict[str, dict]:
    return yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text(encoding="utf-8"))["services"]


def test_build_context_contains_exactly_what_the_dockerfile_copies():
    copied = [word for line in lines("Dockerfile") if line.startswith("COPY ") for word in line.split()[1:-1]]
    patterns = lines(".dockerignore")
    assert patterns[0] == "*"
    assert sorted(pattern[1:] for pattern in patterns if pattern.startswith("!")) == sorted(copied)
    assert [pattern for pattern in patterns[1:] if not pattern.startswith("!")] == ["**/__pycache__"]


def test_packages_are_installed_before_anything_that_changes_often():
    order = [line for line in lines("Dockerfile") if re.match(r"COPY |RUN cd ", line)]
    assert order[0] == "COPY requirements.txt /opt/loracat/"
    assert order[1].startswith("RUN cd /opt/loracat")


def test_cpu_service_is_the_gpu_service_without_the_gpu():
    gpu, cpu = services()["loracat"], services()["loracat-cpu"]
    assert set(services()) == {"loracat", "loracat-cpu"}
    assert {key: value for key, value in gpu.items() if key not in GPU_ONLY_KEYS} | {"profiles": ["cpu"]} == cpu


def test_compose_file_uses_only_keys_of_compose_1_29_and_2():
    assert set(services()["loracat"]) == KEYS_OF_BOTH_COMPOSE_VERSIONS | GPU_ONLY_KEYS


def test_mounts_are_folders_and_three_of_them_are_writable():
    mounts = [mount.split(":") for mount in services()["loracat"]["volumes"]]
    assert [".", "/app", "ro"] in mounts
    writable = [mount for mount in mounts if mount[-1] != "ro"]
    assert writable == [[f"./{name}", f"/app/{name}"] for name in MOUNTED]
    assert all((REPOSITORY / name).is_dir() for name in MOUNTED)
