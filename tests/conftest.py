"""Shared by all tests: the order of the files, the number of workers, the fork server, and the tiny models, built once per run."""

import fcntl
import gc
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from common import masking

os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it when it is imported; no test may reach the real hub

# Such small networks gain nothing from threads, which spend their time waiting for each other on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# `make test`: the same examples each time. `make fuzz`: new ones, and those that failed before.
UNCHECKED = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
settings.register_profile("test", max_examples=15, derandomize=True, database=None, deadline=None, suppress_health_check=UNCHECKED)
settings.register_profile("fuzz", max_examples=500, print_blob=True, deadline=None, suppress_health_check=UNCHECKED)
settings.load_profile("test")

LONGEST_FIRST = (
    "test_pipeline.py",
    "test_kill.py",
    "test_train_lora.py",
    "test_distributed.py",
    "test_memory_guard.py",
    "test_fast_unet.py",
    "test_export.py",
    "test_caption_images.py",
    "test_collect_images.py",
)
"""Files that take long: started last, one of them would keep a single core busy while the others are idle."""


TESTS_OF_TRAINING = Path(__file__).parent / "training"
FORK_SERVER = "PYTEST_FORK_SERVER"
"""The environment variable through which the workers of pytest-xdist learn the folder of the fork server."""


def pytest_configure(config: pytest.Config) -> None:
    """Start the fork server, unless this is a worker of pytest-xdist; it imports nothing before the first request."""
    if FORK_SERVER in os.environ:
        return
    folder = Path(tempfile.mkdtemp(prefix="loracat-fork-server-"))
    python = folder / "python"
    python.write_text(f"#!/bin/sh\nexec '{sys.executable}' -I -S '{TESTS_OF_TRAINING / 'forked_python.py'}' \"$0\" \"$@\"\n")
    python.chmod(0o755)
    environment = os.environ | {"PYTHONPATH": str(TESTS_OF_TRAINING.parents[1] / "scripts"), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    command = [sys.executable, TESTS_OF_TRAINING / "fork_server.py", folder / "socket"]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True)
    os.environ[FORK_SERVER] = str(folder)

    def end() -> None:
        del os.environ[FORK_SERVER]
        server.communicate()
        shutil.rmtree(folder)

    config.add_cleanup(end)


@pytest.fixture(scope="session")
def forked_python() -> Path:
    """A command that runs a script like the interpreter, but without importing its libraries; see training/forked_python.py."""
    return Path(os.environ[FORK_SERVER]) / "python"


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """`-n auto`: one more than there are cores, because many tests wait for a server, a process or the clock."""
    return len(os.sched_getaffinity(0)) + 1


def pytest_collection_finish(session: pytest.Session) -> None:
    """Exclude what is imported by now from garbage collection, and collect less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def position(item: pytest.Item) -> int:
        name = item.path.name
        return LONGEST_FIRST.index(name) if name in LONGEST_FIRST else len(LONGEST_FIRST)

    items.sort(key=position)


@pytest.fixture(autouse=True)
def no_known_secrets(monkeypatch):
    """The secrets of one test are not masked in the messages of the next one."""
    monkeypatch.setattr(masking, "_known", set())


@pytest.fixture(scope="session")
def built_once(tmp_path_factory, worker_id) -> Callable[[str, Callable[[Path], object]], Path]:
    """A function of a name and a function that builds what is called so at a path: it is built by the first worker that needs it,
    and read by all."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent

    def get(name: str, build: Callable[[Path], object]) -> Path:
        path = shared / "built" / name
        complete, lock = (path.with_name(f".{path.name}-{what}") for what in ("complete", "lock"))
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not complete.exists():
                build(path)
                complete.touch()
        return path

    return get


@pytest.fixture(scope="session")
def tiny_sdxl(built_once) -> Path:
    """A tiny SDXL as a diffusers folder. Read only: copy it before changing anything."""

    def build(path: Path) -> None:
        from demo.tiny_sdxl import build  # imports diffusers, which takes seconds and most tests do not need

        build(path)

    return built_once("models/tiny-sdxl", build)


@pytest.fixture(scope="session")
def tiny_single_file(tiny_sdxl, built_once) -> Path:
    """The same weights as one `.safetensors`, without a tokenizer beside it."""
    from demo.tiny_sdxl import write_single_file

    return built_once("single/tiny-sdxl.safetensors", lambda path: write_single_file(tiny_sdxl, path))
