"""A data set that the first version collected, captioned and half trained is continued, with nothing done twice."""

import contextlib
import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest

import caption_images
import collect_images
import train_lora
from common.errors import run_main
from common.files import read_json_lines
from common.output_layout import OutputLayout
from common.settings import REPOSITORY
from common.weights import read_header
from demo.environment import DemoEnvironment

FIRST_VERSION = REPOSITORY / "tests" / "data" / "first_version"
"""What the first version left of two prompts: the data set; a finished LoRA; a run stopped after 4 of its 12 steps."""
FINISHED = {
    "resolution": 64,
    "lora_rank": 1,
    "lora_alpha": "auto",
    "lora_targets": "attention",
    "train_batch_size": 2,
    "num_train_epochs": 3,
    "save_every_epochs": 0,
    "caption_variants": 2,
    "caption_chunks": 1,
}
HALF = FINISHED | {"lora_alpha": 1, "num_train_epochs": 12, "learning_rate": 0.001, "keep_last_states": 1}


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> DemoEnvironment:
    """The demo environment with the first version's files in the place of its own."""
    built = DemoEnvironment.build(tmp_path_factory.mktemp("upgrade"))
    shutil.copytree(FIRST_VERSION, built.folder, dirs_exist_ok=True)
    return built


def run(environment: DemoEnvironment, stage: ModuleType, url: str = "http://127.0.0.1:1", **settings: object) -> str:
    """What the stage prints; it must succeed. It runs within this process, which saves seconds of imports."""
    output = io.StringIO()
    main = stage.main if stage is collect_images else lambda: stage.main([])
    variables = mock.patch.dict(os.environ, environment.environment(url, **settings), clear=True)
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    with variables, mock.patch.object(sys, "argv", [stage.__name__]), contextlib.redirect_stdout(output):
        code = run_main(stage.STAGE, main)
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    assert code == 0
    return output.getvalue()


def files_in(folder: Path) -> dict[str, bytes]:
    """Every file but those that hold times of change, which a copy does not keep, and thumbnails, whose names depend on them."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in ("pictures.json", "model.json")]
    files = [path for path in files if path.parent.name != "thumbnails"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_nothing_is_collected_or_captioned_again(environment):
    before = files_in(environment.dataset)
    with environment.serve() as comfyui:
        assert "nothing was sent" in run(environment, collect_images, comfyui.url)
    assert "nothing to do: all 2 captions are up to date" in run(environment, caption_images, **FINISHED)
    assert files_in(environment.dataset) == before


def test_finished_lora_is_recognised(environment):
    finished = environment.folder / "finished"
    before = files_in(finished / "lora")
    assert "nothing to do" in run(environment, train_lora, output_dir=finished, **FINISHED)
    assert files_in(finished / "lora") == before


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-1], lambda content: content[:200_000], lambda content: b"[" * 300_000]
)
def test_a_corrupt_lora_is_not_a_finished_one(tmp_path, damage):
    outputs = OutputLayout(tmp_path, "demo_person")
    content = (FIRST_VERSION / "finished" / "lora" / "demo_person.safetensors").read_bytes()
    outputs.lora_dir.mkdir()
    outputs.lora.write_bytes(content)
    fingerprint = read_header(outputs.lora).metadata["loracat_fingerprint"]
    assert outputs.is_finished(fingerprint)
    outputs.lora.write_bytes(damage(content))
    assert not outputs.is_finished(fingerprint)


def test_half_trained_run_is_continued_to_the_same_end(environment):
    """Nothing is encoded again, and each later step has the loss of the first version's uninterrupted run."""
    half = environment.folder / "half"
    printed = run(environment, train_lora, output_dir=half, **HALF)
    assert "continuing at step 4" in printed
    assert ": 0 encoded, 2 in the cache" in printed
    assert ": 0 encoded, 3 in the cache" in printed
    assert (half / "lora" / "demo_person.safetensors").exists()
    expected = [json.loads(line) for line in (FIRST_VERSION / "uninterrupted_metrics.jsonl").read_text().splitlines()]
    taken = read_json_lines(half / "lora" / "metrics.jsonl")
    assert [line["step"] for line in taken] == list(range(12))
    for mine, first in zip(taken, expected, strict=True):
        # Sums in another order than the first version's change the last digit of a loss, and more of a gradient's.
        assert mine.pop("gradient_norm") == pytest.approx(first.pop("gradient_norm"), rel=1e-3)
        assert mine == pytest.approx(first, rel=1e-5)
