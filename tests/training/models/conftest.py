"""Fixtures of the tests of base models."""

import shutil
import socket
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def folder(tiny_sdxl, tmp_path) -> Path:
    """A copy of the tiny SDXL that a test may change."""
    return shutil.copytree(tiny_sdxl, tmp_path / "sdxl")
