"""Real photographs, the tiny tagger, and the caption stage as a user runs it."""

import contextlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import skimage.data
from PIL import Image

import caption_images
from common.errors import run_main
from common.settings import REPOSITORY
from demo import tiny_tagger

PHOTOGRAPHS = Path(skimage.data.__file__).parent


@pytest.fixture(scope="session")
def photographs() -> dict[str, Image.Image]:
    """Photographs that ship with scikit-image, by name."""
    names = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")
    images = {Path(name).stem: Image.open(PHOTOGRAPHS / name).convert("RGB") for name in names}
    images["rocket"].info.clear()  # its profile is Adobe RGB, and `save` would write it
    return images


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """The folder of a tiny tagger."""
    return tiny_tagger.build(tmp_path_factory.mktemp("tagger"))


@pytest.fixture
def stage(tmp_path, tiny):
    """caption_images.py on `tmp_path`; see `Stage`."""
    return Stage(tmp_path, tiny)


@pytest.fixture
def stage_in():
    """The same for another workspace and tagger."""
    return Stage


class Stage:
    """caption_images.py on a workspace of its own."""

    def __init__(self, workspace: Path, tagger: Path):
        self.images = workspace / "dataset" / "images"
        self.record = workspace / "dataset" / ".loracat" / "captions.jsonl"
        self.models = workspace / "models"
        self.images.mkdir(parents=True)
        variables = {"DATASET_DIR": self.images.parent, "MODELS_DIR": self.models, "CAPTION_MODEL": tagger, "FACE_MODEL": "off"}
        variables |= {"HF_HOME": workspace / "hf", "HF_HUB_OFFLINE": "1", "CAPTION_PRUNE_TRAITS": "0"}
        self.variables = {name: str(value) for name, value in variables.items()}

    def start(self, *flags: str, stderr: int = subprocess.PIPE, **variables: object) -> subprocess.Popen:
        """The stage as a process of its own."""
        command = [sys.executable, str(REPOSITORY / "scripts" / "caption_images.py"), *flags]
        environment = self._environment(variables)
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True)

    def run_process(self, *flags: str, **variables: object) -> subprocess.CompletedProcess:
        """A process run to its end. Whatever happens, a user never sees a traceback."""
        process = self.start(*flags, **variables)
        output, errors = process.communicate(timeout=60)
        assert "Traceback" not in errors
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def run(self, *flags: str, **variables: object) -> subprocess.CompletedProcess:
        """The same within this process, which is faster; huggingface_hub reads its variables only in a new one."""
        handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
        output, errors = io.StringIO(), io.StringIO()
        environment = mock.patch.dict(os.environ, self._environment(variables), clear=True)
        try:
            with environment, contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
                code = run_main(caption_images.STAGE, lambda: caption_images.main(list(flags)))
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
        assert "Traceback" not in errors.getvalue()
        return subprocess.CompletedProcess(flags, code, output.getvalue(), errors.getvalue())

    def _environment(self, variables: dict[str, object]) -> dict[str, str]:
        mine = {name: value for name, value in os.environ.items() if not name.startswith(("CAPTION_", "HF_", "TRIGGER"))}
        return mine | self.variables | {name: str(value) for name, value in variables.items()}

    def stored(self) -> list[Path]:
        """The files that hold the probabilities of one image each."""
        return sorted(self.record.parent.glob("tags/*/*.npy"))

    def captions_as_bytes(self) -> dict[str, bytes]:
        """Relative path -> content of all captions."""
        return {path.relative_to(self.images).as_posix(): path.read_bytes() for path in self.images.rglob("*.txt")}

    def captions(self) -> dict[str, str]:
        """Relative path -> text of all captions."""
        found = sorted(self.images.rglob("*.txt"))
        return {path.relative_to(self.images).as_posix(): path.read_text(encoding="utf-8") for path in found}
