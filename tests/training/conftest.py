"""Shared by the tests of training: real photographs, and the train stage as a user runs it."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import skimage.data
from PIL import Image

import train_lora
from common.errors import run_main
from common.settings import REPOSITORY
from demo.environment import setting_names

PHOTOGRAPHS = Path(skimage.data.__file__).parent


@pytest.fixture(scope="session")
def photographs() -> dict[str, Image.Image]:
    """Photographs that ship with scikit-image, by name: astronaut 512x512, coffee 600x400, chelsea 451x300, rocket 640x427."""
    names = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")
    images = {Path(name).stem: Image.open(PHOTOGRAPHS / name).convert("RGB") for name in names}
    images["rocket"].info.clear()  # its profile is Adobe RGB, and `save` would write it
    return images


@pytest.fixture
def mount_tmpfs() -> Iterator[Callable[[Path, str], None]]:
    """A function that creates a folder and mounts a tmpfs with options there. Skips the test where this user may not mount."""
    mounted = []

    def mount(folder: Path, options: str) -> None:
        folder.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode:
            pytest.skip("this user may not mount a tmpfs")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def stage(tmp_path, tiny_sdxl, photographs):
    """train_lora.py on `tmp_path`; see `Stage`."""
    return Stage(tmp_path, tiny_sdxl, photographs)


@pytest.fixture(scope="session")
def shared_stage(tmp_path_factory, tiny_sdxl, photographs) -> Callable[[str], "Stage"]:
    """A function that returns a new stage in a folder of this name, for a run that several tests read."""
    return lambda name: Stage(tmp_path_factory.mktemp(name), tiny_sdxl, photographs)


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


class Stage:
    """train_lora.py in its own workspace, with settings for a run of seconds."""

    def __init__(self, workspace: Path, base: Path, photographs: dict[str, Image.Image]):
        self.dataset, self.output, self.models = (workspace / name for name in ("dataset", "output", "models"))
        self.images, self.lora = self.dataset / "images", self.output / "lora" / "sks.safetensors"
        self.photographs, self.base = photographs, base
        for folder in (self.images, self.models):
            folder.mkdir(parents=True)
        self.variables = {
            "DATASET_DIR": self.dataset,
            "OUTPUT_DIR": self.output,
            "MODELS_DIR": self.models,
            "BASE_MODEL": base,
            "TRIGGER_WORD": "sks",
            "RESOLUTION": 64,
            "CAPTION_VARIANTS": 2,
            "LORA_RANK": 2,
            "LORA_ALPHA": 2,
            "TRAIN_BATCH_SIZE": 2,
            "NUM_TRAIN_EPOCHS": 2,
            "DATALOADER_NUM_WORKERS": 1,
            "HF_HUB_OFFLINE": 1,
            "SAMPLES": "false",
            "FACE_MODEL": "off",
        }

    def add(self, photograph: str, path: str = "", caption: str | None = "sks, photo, outdoors", **how: object) -> Path:
        """Save a photograph and its caption in the data set; `how` goes to Pillow. Returns the image's path."""
        file = self.images / (path or f"{photograph}.png")
        file.parent.mkdir(exist_ok=True)
        self.photographs[photograph].save(file, **{"compress_level": 0} | how)  # uncompressed PNG takes a twentieth of the time
        if caption is not None:
            file.with_suffix(".txt").write_text(caption, encoding="utf-8")
        return file

    def start(self, *flags: str, python: str | Path = sys.executable, **variables: object) -> subprocess.Popen:
        """Start the stage as a process."""
        command = [python, str(REPOSITORY / "scripts" / "train_lora.py"), *flags]
        environment = self._environment(variables)
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=environment, text=True, **pipes)

    def run(self, *flags: str, terminal: bool = False, **variables: object) -> subprocess.CompletedProcess:
        """Run the stage in this process, which saves the time of the imports. It must never print a traceback.

        On a `terminal` there are progress bars on standard error.
        """
        handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
        output, errors = io.StringIO(), Terminal() if terminal else io.StringIO()
        environment = mock.patch.dict(os.environ, self._environment(variables), clear=True)
        try:
            with environment, contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
                code = run_main(train_lora.STAGE, lambda: train_lora.main(list(flags)))
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
        assert "Traceback" not in errors.getvalue(), errors.getvalue()
        return subprocess.CompletedProcess(flags, code, output.getvalue(), errors.getvalue())

    def stopped(self, steps: int, signum: signal.Signals, **variables: object) -> subprocess.CompletedProcess:
        """Run in this process and send a signal after so many steps."""
        return self.disturbed(steps, lambda is_over: os.kill(os.getpid(), signum), **variables)

    def disturbed(self, steps: int, disturb: Callable[[threading.Event], None], **variables: object) -> subprocess.CompletedProcess:
        """Run in this process. After so many steps a thread calls `disturb` with an event that is set when the run is over."""
        is_over = threading.Event()

        def wait_and_disturb() -> None:
            until = time.monotonic() + 120
            while self.steps_taken() < steps and time.monotonic() < until:
                if is_over.wait(0.005):
                    return
            disturb(is_over)

        thread = threading.Thread(target=wait_and_disturb)
        thread.start()
        try:
            return self.run(**variables)
        finally:
            is_over.set()
            thread.join()

    def steps_taken(self) -> int:
        """Lines in metrics.jsonl: the steps taken, if no images are held out."""
        metrics = self.output / "lora" / "metrics.jsonl"
        return len(metrics.read_bytes().splitlines()) if metrics.exists() else 0

    def wait_for_steps(self, process: subprocess.Popen, count: int) -> None:
        """Wait until a running process has taken so many steps."""
        until = time.monotonic() + 120
        while self.steps_taken() < count:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.005)

    def trained(self, **variables: object) -> str:
        """Run, expect success and nothing on standard error, and return the output."""
        ended = self.run(**variables)
        assert (ended.returncode, ended.stderr) == (0, "")
        return ended.stdout

    def files(self) -> dict[str, bytes]:
        """Relative path -> bytes of every file in the output folder, but the page and the history, which differ each time."""
        found = sorted(path for path in self.output.rglob("*") if path.is_file())
        found = [path for path in found if path.name not in ("report.html", "history.jsonl")]
        return {path.relative_to(self.output).as_posix(): path.read_bytes() for path in found}

    def _environment(self, variables: dict[str, object]) -> dict[str, str]:
        users = {name: value for name, value in os.environ.items() if name not in setting_names()}
        return users | {name: str(value) for name, value in (self.variables | variables).items()}


@dataclass(frozen=True)
class Finished:
    """A finished run. Read only."""

    stage: Stage
    variables: dict[str, object]
    """Its settings, in addition to the stage's own."""
    output: str
    """What it printed."""
    files: dict[str, bytes]
    """What it left in the output folder."""


@pytest.fixture(scope="session")
def finished(tmp_path_factory, tiny_sdxl, photographs) -> Finished:
    """Four photographs, one of each format, one of them repeated three times per epoch; two epochs at a high learning rate."""
    stage = Stage(tmp_path_factory.mktemp("finished"), tiny_sdxl, photographs)
    stage.add("astronaut", caption="sks, woman, smile, orange suit")
    stage.add("coffee", "coffee.jpg", caption="sks, cup, table")
    stage.add("chelsea", "chelsea.webp", caption="sks, cat, close-up")
    stage.add("rocket", "3_rockets/rocket.bmp", caption="sks, rocket, night")
    variables = {"LEARNING_RATE": 0.01, "SAVE_EVERY_EPOCHS": 1, "LORA_ALPHA": 1}
    return Finished(stage, variables, stage.trained(**variables), stage.files())
