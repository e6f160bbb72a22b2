"""The report page, by the program itself: what it shows, what it never shows, and that nothing can break it."""

import json
import os
import re
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


def test_an_empty_project_has_a_page_that_says_what_to_do(project):
    html = project.html()
    assert "Nothing is trained yet." in html
    assert "There are no images in the data set." in html


def test_images_come_with_their_captions_flaws_and_tags(project):
    project.add_image("a.png", "sks_woman, smile, hat")
    project.add_image("b.png", "sks_woman, smile")
    project.add_image("c.png")
    records = project.dataset / ".loracat"
    records.mkdir()
    (records / "audit.json").write_text('{"flagged": {"b.png": {"sha256": "", "flaws": {"blurred": "sharpness 3"}}}}')
    (records / "traits.json").write_text('{"pruned": {}, "kept": {"long hair": 0.5}}')
    html = project.html()
    assert "3 images, 2 with a caption" in html
    assert "blurred: sharpness 3" in html
    assert "long hair 50 %" in html
    assert re.findall(r"(\d)&nbsp;(\w+)</li>", html) == [("2", "smile"), ("1", "hat")]
    assert html.count("data:image/webp;base64,") == 3
    assert html.count("no caption") == 1


def test_a_finished_run_shows_files_curves_and_recipe(project):
    project.add_run()
    html = project.html()
    assert "sks_woman.safetensors" in html
    assert "after epoch 5" in html
    assert "ab12" * 16 in html
    assert html.count("<svg") == 2
    assert "validation loss" in html
    assert "LEARNING_RATE=5e-05 docker compose run --rm loracat --train" in html


def test_an_unfinished_run_says_how_to_continue(project):
    project.add_run(finished=False)
    html = project.html()
    assert "The run is not finished." in html
    assert "step 30" in html


def test_sample_images_and_the_recommended_file_are_shown(project):
    project.add_run()
    project.add_samples()
    html = project.html()
    assert "sks_woman-000005.safetensors</code> at strength 0.8" in html
    assert html.count('<img src="data:image/webp') == 4
    assert 'href="samples/sks_woman/after%20epoch%205-0.png"' in html
    assert html.count("likeness 0.41") == 2


def test_texts_of_the_user_stay_text(project):
    evil = "<script>alert(1)</script>"
    project.add_image("a.png", f"sks_woman, {evil}")
    project.add_run()
    project.add_samples()
    html = project.html()
    assert html.count("<script") == 1  # the page's own
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "<b>on a beach" not in html


def test_the_page_holds_no_login_and_no_path_outside_the_project(project, tmp_path):
    project.add_image("a.png", "sks_woman")
    project.add_run()
    html = project.html()
    for secret in ("hunter2", "anna", "/srv", str(tmp_path)):
        assert secret not in html
    assert "base.safetensors" in html


@pytest.mark.parametrize("name", ["training_config_resolved.toml", "metrics.jsonl", "sks_woman.safetensors"])
def test_half_written_files_of_a_run_are_left_out(project, name):
    project.add_run()
    path = project.output / "lora" / name
    path.write_bytes(path.read_bytes()[:7])
    project.html()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"prompts": 1, "rows": 2}', '{"prompts": [], "rows": [{"label": 1}]}', "[" * 99999]
)
def test_a_broken_record_of_samples_is_left_out(project, content):
    project.add_run()
    project.add_samples()
    (project.output / "samples/sks_woman/samples.json").write_text(content)
    assert "There are no sample images of this run." in project.html()


def test_an_image_that_cannot_be_read_is_named(project):
    project.add_image("a.png", "sks_woman").write_bytes(b"not an image")
    assert "cannot be read" in project.html()


def test_thumbnails_are_made_once_and_removed_with_their_image(project):
    image = project.add_image("a.png", "sks_woman")
    project.html()
    (thumbnail,) = (project.dataset / ".loracat/thumbnails").iterdir()
    made = thumbnail.stat().st_mtime_ns
    project.html()
    assert thumbnail.stat().st_mtime_ns == made
    image.unlink()
    project.html()
    assert not thumbnail.exists()


def test_two_hundred_images_and_ten_saves_stay_under_ten_megabytes(project):
    first = project.add_image("0.png", "sks_woman, smile")
    for number in range(1, 200):
        os.link(first, first.with_name(f"{number}.png"))
    project.add_run()
    project.html()
    assert project.page.stat().st_size < 10e6


def test_a_page_that_cannot_be_written_is_one_line_and_exit_code_2(project):
    project.output.write_text("a file")
    done = project.report()
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
