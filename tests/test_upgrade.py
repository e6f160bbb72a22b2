"""A data set that the first version collected, captioned and half trained is continued, with nothing done twice."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common.files import read_json_lines
from common.settings import REPOSITORY
from demo.environment import DemoEnvironment

FIRST_VERSION = REPOSITORY / "tests" / "data" / "first_version"
"""What the first version left of two prompts: the data set; a finished LoRA; a run stopped after 4 of its 12 steps."""
FINISHED = {
    "resolution": 64,
    "lora_rank": 1,
    "lora_alpha": 1,
    "lora_targets": "attention",
    "train_batch_size": 2,
    "num_train_epochs": 3,
    "save_every_epochs": 0,
    "caption_variants": 2,
    "caption_chunks": 1,
}
HALF = FINISHED | {"num_train_epochs": 12, "learning_rate": 0.001, "keep_last_states": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> DemoEnvironment:
    """the demo environment with the first version's files in the place of its own."""
    built = DemoEnvironment.build(tmp_path_factory.mktemp("upgrade"))
    shutil.copytree(FIRST_VERSION, built.folder, dirs_exist_ok=True)
    return built


def run(world: DemoEnvironment, stage: str, url: str = "http://127.0.0.1:1", **settings: object) -> str:
    """What the stage prints; it must succeed."""
    script = REPOSITORY / "scripts" / f"{stage}.py"
    ended = subprocess.run(
        [sys.executable, script], env=world.environment(url, **settings), capture_output=True, text=True, timeout=200
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def files_in(folder: Path) -> dict[str, bytes]:
    """Every file but those that hold times of change, which a copy does not keep."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in ("pictures.json", "model.json")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_nothing_is_collected_or_captioned_again(world):
    before = files_in(world.dataset)
    with world.serve() as comfyui:
        assert "nothing was sent" in run(world, "collect_images", comfyui.url)
    assert "nothing to do: all 2 captions are up to date" in run(world, "caption_images", **FINISHED)
    assert files_in(world.dataset) == before


def test_finished_lora_is_recognised(world):
    finished = world.folder / "finished"
    before = files_in(finished / "lora")
    assert "nothing to do" in run(world, "train_lora", output_dir=finished, **FINISHED)
    assert files_in(finished / "lora") == before


def test_half_trained_run_is_continued_to_the_same_end(world):
    """Nothing is encoded again, and each later step has the loss of the first version's uninterrupted run."""
    half = world.folder / "half"
    printed = run(world, "train_lora", output_dir=half, **HALF)
    assert "continuing at step 4" in printed
    assert ": 0 encoded, 2 in the cache" in printed
    assert ": 0 encoded, 3 in the cache" in printed
    assert (half / "lora" / "demo_person.safetensors").exists()
    expected = [json.loads(line) for line in (FIRST_VERSION / "uninterrupted_metrics.jsonl").read_text().splitlines()]
    taken = read_json_lines(half / "lora" / "metrics.jsonl")
    assert [line["step"] for line in taken] == list(range(12))
    for mine, first in zip(taken, expected, strict=True):
        assert mine == pytest.approx(first, rel=1e-5)
