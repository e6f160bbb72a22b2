"""A stand-in ComfyUI in this process, and two ways to run the collector against it."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from comfyui_workspace import Result, Workspace, png

import collect_images
from common.errors import run_main
from demo.standin_comfyui.server import StandIn


@pytest.fixture
def standin(tmp_path: Path) -> Iterator[StandIn]:
    with StandIn(tmp_path / "server") as server:
        yield server


@pytest.fixture
def space(tmp_path: Path, standin: StandIn) -> Workspace:
    """A workspace whose collector talks to the stand-in, with a face and no delay between submissions."""
    made = Workspace(tmp_path)
    made.environment |= {
        "COMFYUI_ENDPOINT": standin.url,
        "COMFYUI_DELAY": "0",
        "DATASET_DIR": str(made.dataset),
        "GLOBAL_SEED": "",
        "NEW_SEEDS": "",
    }
    made.write("FACE_REFERENCE", "face.png", png())
    return made


@pytest.fixture
def collect(space: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Result]:
    """Run the collector in this process: `collect("--check", GLOBAL_SEED="5")`."""
    monkeypatch.setattr("collect_images.stop_on_signals", lambda: None)
    monkeypatch.setattr("collecting.harvest.DOWNLOAD_RETRY_DELAYS_S", (0.0, 0.0))
    monkeypatch.setattr("collecting.worker.QUEUE_CHECK_INTERVAL_S", 0.1)
    monkeypatch.setattr("collecting.pacing.poll_interval_s", lambda typical_s, waited_s: 0.01)

    def run(*flags: str, **variables: str) -> Result:
        for name, value in {**space.environment, **variables}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["collect_images.py", *flags])
        code = run_main("collect_images", collect_images.main)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run
