"""A project folder with the files that the stages leave, for the tests of the report page."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from skimage import data

ROOT = Path(__file__).parents[2]
CONFIG = """
[project]
trigger_word = "sks_woman"
models_dir = "/srv/anna/private/models"

[train.model]
base_model = "/srv/anna/private/models/base.safetensors"

[train.optimizer]
learning_rate = 5e-05  # set by LEARNING_RATE
optimizer = "adamw"

[collect]
comfyui_endpoint = "https://anna:hunter2@host:8188"

[train.saving]
output_name = "sks_woman"
"""


class Project:
    """A project folder with the files that the stages leave."""

    def __init__(self, root: Path):
        self.dataset, self.output = root / "dataset", root / "output"
        self.page = self.output / "report.html"

    def add_image(self, name: str, caption: str | None = None) -> Path:
        path = self.dataset / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(data.astronaut()).save(path)
        if caption is not None:
            path.with_suffix(".txt").write_text(caption, encoding="utf-8")
        return path

    def add_run(self, config: str = CONFIG, steps: int = 30, finished: bool = True) -> None:
        lora = self.output / "lora"
        lora.mkdir(parents=True)
        (lora / "training_config_resolved.toml").write_text(config, encoding="utf-8")
        lines = [{"step": n, "loss": 1 / (n + 1), "lr": 1e-4} for n in range(steps)]
        lines.append({"step": steps, "validation_loss": 0.5})
        (lora / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        if finished:
            metadata = {"sshs_model_hash": "ab12" * 16, "loracat_version": "2.0.0"}
            save_file({"a": np.zeros(4, np.float16)}, lora / "sks_woman.safetensors", metadata)
            save_file({"a": np.zeros(4, np.float16)}, lora / "sks_woman-000005.safetensors", metadata)

    def add_samples(self) -> None:
        folder = self.output / "samples" / "sks_woman"
        folder.mkdir(parents=True)
        rows = []
        for label in ("base model", "after epoch 5"):
            images = [f"{label}-{n}.png" for n in range(2)]
            for image in images:
                Image.fromarray(data.coffee()).save(folder / image)
            rows.append({"label": label, "images": images, "likeness": [0.41, None]})
        prompts = [{"text": "sks_woman"}, {"text": "sks_woman <b>on a beach</b>"}]
        best = {"file": "sks_woman-000005.safetensors", "strength": 0.8, "reason": "highest likeness."}
        (folder / "samples.json").write_text(json.dumps({"prompts": prompts, "rows": rows, "recommended": best}))

    def add_record(self, path: str, content: object) -> None:
        """Write a JSON file, relative to the project folder."""
        target = self.dataset.parent / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(content), encoding="utf-8")

    def report(self, *flags: str) -> subprocess.CompletedProcess:
        """The program as a user runs it."""
        settings = {"DATASET_DIR": self.dataset, "OUTPUT_DIR": self.output, "TRIGGER_WORD": "sks_woman"}
        environment = os.environ | {name: str(value) for name, value in settings.items()}
        command = [sys.executable, str(ROOT / "scripts/report.py"), *flags]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    def html(self) -> str:
        done = self.report()
        assert (done.returncode, done.stderr) == (0, "")
        return self.page.read_text(encoding="utf-8")


@pytest.fixture
def project(tmp_path) -> Project:
    return Project(tmp_path)
