"""What torch and Triton read from the environment."""

import os

import pytest

from training.system import environment
from training.system.environment import lacks_kernels, let_segments_grow, segments_grow

NAMES = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in (*NAMES, "TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_segments_grow_unless_the_user_has_set_how_memory_is_allocated(monkeypatch):
    assert not segments_grow()
    monkeypatch.setattr(os, "environ", dict(os.environ))
    let_segments_grow()
    assert os.environ[NAMES[0]] == "expandable_segments:True"
    assert segments_grow()


@pytest.mark.parametrize("name", NAMES)
def test_what_the_user_has_set_is_kept(monkeypatch, name):
    for value, grows in (("max_split_size_mb:128", False), ("", False), ("max_split_size_mb:128,expandable_segments:True", True)):
        monkeypatch.setenv(name, value)
        before = dict(os.environ)
        let_segments_grow()
        assert dict(os.environ) == before
        assert segments_grow() is grows


@pytest.mark.parametrize("variable", ["TRITON_CACHE_DIR", "TRITON_HOME", "HOME"])
def test_kernels_are_missing_until_triton_has_stored_one(tmp_path, monkeypatch, variable):
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv(variable, str(tmp_path))
    folder = tmp_path if variable == "TRITON_CACHE_DIR" else tmp_path / ".triton" / "cache"
    assert lacks_kernels()
    folder.mkdir(parents=True, exist_ok=True)
    assert lacks_kernels()
    (folder / "ABC").mkdir()
    assert not lacks_kernels()


def test_a_cache_that_cannot_be_read_and_a_machine_without_triton_lack_none(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: name)
    assert not lacks_kernels()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "nothing"))
    assert lacks_kernels()
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None)
    assert not lacks_kernels()
