"""Whatever goes wrong between the program and the hub is a HubError; a full disk is not."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from common.hub import HubError, download, download_command, file_size_bytes
from common.settings import REPOSITORY


def failing(monkeypatch, error: Exception):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", fail)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)


@pytest.mark.parametrize("error", [OSError("no network."), HTTPError("no network"), ValueError("no network\nat all")])
def test_failures_are_one_line(monkeypatch, tmp_path, error):
    failing(monkeypatch, error)
    for request in (lambda: file_size_bytes("a/b", "c"), lambda: download("a/b", ["c"], tmp_path)):
        with pytest.raises(HubError) as caught:
            request()
        assert str(caught.value) == "no network"


def test_a_full_disk_is_not_a_failure_of_the_hub(monkeypatch, tmp_path):
    failing(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        download("a/b", ["c"], tmp_path)


def test_errors_of_the_http_library_have_the_base_class_that_is_caught():
    """huggingface_hub imports it under this name, and does not document that."""
    assert issubclass(HfHubHTTPError, HTTPError)
    assert not issubclass(HTTPError, OSError)


@pytest.fixture
def no_hf_in_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_the_command_has_files_and_patterns_and_is_quoted_for_a_shell(monkeypatch, no_hf_in_path):
    monkeypatch.setattr("sys.executable", str(no_hf_in_path / "python"))
    (no_hf_in_path / "hf").touch(0o755)
    assert download_command("a/b", Path("/elsewhere/b"), ("c.onnx",)) == "hf download a/b c.onnx --local-dir /elsewhere/b"
    command = download_command("a/b", Path("/my models/b"), patterns=("vae/*",))
    assert command == "hf download a/b --local-dir '/my models/b' --include 'vae/*'"


def test_the_command_uses_the_hf_of_this_environment(monkeypatch, no_hf_in_path):
    real = Path(sys.executable).with_name("hf")
    assert download_command("a/b", Path("/b")) == f"{real} download a/b --local-dir /b"
    assert subprocess.run([real, "download", "--help"], capture_output=True, check=True).stdout
    monkeypatch.setattr("sys.executable", "/elsewhere/python")
    assert download_command("a/b", Path("/b")) == "/elsewhere/python -m huggingface_hub.cli.hf download a/b --local-dir /b"
    import huggingface_hub.cli.hf  # noqa: F401


def test_the_hf_beside_this_python_comes_before_another_one(monkeypatch, no_hf_in_path):
    (no_hf_in_path / "hf").touch(0o755)
    real = Path(sys.executable).with_name("hf")
    assert download_command("a/b", Path("/b")) == f"{real} download a/b --local-dir /b"
    monkeypatch.setenv("PATH", str(real.parent))
    assert download_command("a/b", Path("/b")) == "hf download a/b --local-dir /b"


def test_in_a_container_the_command_and_its_paths_are_those_of_the_host(monkeypatch):
    monkeypatch.setattr("common.hub.IN_CONTAINER", True)
    command = download_command("a/b", REPOSITORY / "models" / "b")
    assert command == "docker compose run --rm loracat-cpu hf download a/b --local-dir models/b"


@pytest.mark.parametrize(
    "variables",
    [
        {"HF_ENDPOINT": "http://me:secret/x@127.0.0.1:9"},
        {"HF_ENDPOINT": "http://me:secret@127.0.0.1:port"},
        {"HF_ENDPOINT": "http://[me:secret@host"},
        {"HTTPS_PROXY": "http://me:secret/x@127.0.0.1:9"},
        {"HTTPS_PROXY": "http://me:secret@127.0.0.1:port"},
        {"HF_ENDPOINT": "me:secret@127.0.0.1"},
        {"https_proxy": "me:secret@127.0.0.1:99999"},
        {"ALL_PROXY": "foo://me:secret@127.0.0.1:9"},
    ],
)
def test_a_malformed_address_is_one_line_with_its_variable_and_without_its_login(variables):
    """huggingface_hub reads the variables when it is imported."""
    code = """
import os
from pathlib import Path
from common.errors import ModelError, run_main
from common.hub import HubError, file_size_bytes
from common.masking import learn_secrets

def main():
    learn_secrets(os.environ)
    try:
        file_size_bytes("a/b", "c")
    except HubError as error:
        raise ModelError(str(error))

run_main("stage", main)
"""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "scripts"), "HF_HUB_OFFLINE": "0"} | variables
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    (line,) = (ended.stdout + ended.stderr).splitlines()
    assert line.startswith(f"stage: {next(iter(variables))} is not a valid address: ")
    assert "secret" not in line


def test_a_socks_proxy_without_its_package_is_one_line(monkeypatch):
    failing(monkeypatch, ImportError("Using SOCKS proxy, but the 'socksio' package is not installed."))
    with pytest.raises(HubError, match="'socksio' package is not installed"):
        file_size_bytes("a/b", "c")
