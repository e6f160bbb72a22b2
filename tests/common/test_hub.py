"""Whatever goes wrong between the program and the hub is a HubError; a full disk is not."""

import errno
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


def test_the_command_has_files_and_patterns_and_a_path_that_is_valid_on_the_host_too():
    assert download_command("a/b", Path("/elsewhere/b"), ("c.onnx",)) == "hf download a/b c.onnx --local-dir /elsewhere/b"
    command = download_command("a/b", REPOSITORY / "models" / "b", patterns=("vae/*",))
    assert command == "hf download a/b --local-dir models/b --include 'vae/*'"
