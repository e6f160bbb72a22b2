"""Shared by the tests of collecting: recordings, workflows, a face image, and a workspace to run the collector in."""

import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

import collect_images
from common.files import read_json_lines

DATA = Path(__file__).resolve().parent.parent / "data" / "comfyui"
COLLECTOR = Path(collect_images.__file__)


def recorded(name: str, version: str = "0.3.64") -> list[dict]:
    """The exchanges of one recording; of a newer version than 0.3.64 only what differs was recorded."""
    exchanges = {}
    for path in (DATA / name, DATA / version / name):
        if path.is_file():
            exchanges |= {each["name"]: each for each in json.loads(path.read_text(encoding="utf-8"))["exchanges"]}
    return list(exchanges.values())


def workflow(name: str) -> dict:
    """A new copy of one of the recorded workflows."""
    return json.loads((DATA / "workflows" / name).read_text(encoding="utf-8"))


def png(colour: tuple[int, int, int] = (200, 120, 90), size: tuple[int, int] = (24, 32)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, colour).save(content, "PNG")
    return content.getvalue()


@dataclass
class Result:
    """Exit code and output of a run of the collector."""

    code: int
    out: str
    err: str


@dataclass
class Workspace:
    """A data set folder, the files that the settings name, and the variables that name them."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def dataset(self) -> Path:
        return self.root / "dataset"

    def write(self, key: str, name: str, content: object) -> None:
        """Write one of the collector's files and set the variable `key` to its path."""
        path = self.root / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        self.environment[key] = str(path)

    def per_batch(self, prompts: list) -> None:
        self.write("COMFYUI_WORKFLOW", "workflow.json", workflow("per_batch_ksampler.json"))
        self.write("WORKFLOW_CONFIG", "config.json", workflow("per_batch_ksampler.config.json"))
        self.write("PROMPTS_FILE", "prompts.json", prompts)

    def full_workflow(self) -> None:
        self.write("COMFYUI_WORKFLOW", "workflow.json", workflow("full_workflow_no_model.json"))
        self.write("WORKFLOW_CONFIG", "config.json", workflow("full_workflow_no_model.config.json"))

    def manifest(self) -> list[dict]:
        return read_json_lines(self.dataset / "manifest.jsonl")

    def images(self) -> dict[str, bytes]:
        folder = self.dataset / "images"
        return {path.name: path.read_bytes() for path in sorted(folder.glob("[!.]*"))}

    def start(self, **more: str) -> subprocess.Popen:
        """Start the collector as a process."""
        environment = {**os.environ, **self.environment, **more}
        return subprocess.Popen(
            [sys.executable, str(COLLECTOR)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
