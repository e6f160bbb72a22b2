"""scripts/run.sh on the demo environment, as a user runs it: the exact files it writes, and its messages about wrong input."""

import importlib
import json
import os
import re
import runpy
import subprocess
import sys
from collections import Counter
from dataclasses import make_dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from collecting.jobs import parse_entries
from collecting.workflow import parse_workflow
from common.files import read_json_lines, sha256_of
from common.settings import REPOSITORY, VERSION, resolve
from common.settings_file import TABLES
from demo.__main__ import empty_workspace
from demo.comfyui_modules import unet_layers
from demo.environment import PROMPTS, RUN_SH, SECTIONS, TRIGGER_WORD, DemoEnvironment
from demo.standin_comfyui.images import scene
from demo.standin_comfyui.server import StandIn

IMAGES = len(PROMPTS)
QUICK = {"num_train_epochs": 2, "save_every_epochs": 1, "train_batch_size": 5, "resolution": 64, "caption_variants": 1}
SHIPPED = ("workflow_api.json", "config/workflow_config.json", "prompts_example.json")
WORKFLOWS = REPOSITORY / "tests" / "data" / "comfyui" / "workflows"

FILES_IN_DATASET = {
    "images/node8_<hash>.png": IMAGES,
    "images/node8_<hash>.txt": IMAGES,
    "manifest.jsonl": 1,
    ".loracat/collect.jsonl": 1,
    ".loracat/captions.jsonl": 1,
    ".loracat/pictures.json": 1,
    ".loracat/audit.json": 1,
    ".loracat/traits.json": 1,
    ".loracat/tags/<hash>/model.json": 1,
    ".loracat/tags/<hash>/selected_tags.csv": 1,
    ".loracat/tags/<hash>/<hash>.npy": IMAGES,
    ".loracat/thumbnails/<hash>.webp": IMAGES,
}
FILES_IN_OUTPUT = {
    "cache/digests.json": 1,
    "cache/predictions.json": 1,
    "cache/latents/<hash>.safetensors": IMAGES,
    "cache/text/<hash>.safetensors": IMAGES + 1,  # the captions and the empty caption
    f"lora/{TRIGGER_WORD}.safetensors": 1,
    f"lora/{TRIGGER_WORD}-000001.safetensors": 1,
    f"lora/{TRIGGER_WORD}-recommended.safetensors": 1,
    f"lora/{TRIGGER_WORD}.workflow.json": 1,
    "lora/metrics.jsonl": 1,
    "lora/training_config_resolved.toml": 1,
    "report.html": 1,
    "state/.lock": 1,
    f"state/{TRIGGER_WORD}/history.jsonl": 1,
    f"state/{TRIGGER_WORD}/image_losses.json": 1,
    f"state/{TRIGGER_WORD}/sample_losses.jsonl": 1,
    f"state/{TRIGGER_WORD}/step-000000004.json": 1,  # from which the run can be extended
    f"state/{TRIGGER_WORD}/step-000000004.safetensors": 1,
}


@pytest.fixture(scope="module")
def demo_env(tmp_path_factory) -> DemoEnvironment:
    return DemoEnvironment.build(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def comfyui(demo_env):
    with demo_env.serve() as server:
        yield server


@pytest.fixture(scope="module")
def finished(demo_env, comfyui) -> DemoEnvironment:
    """The demo environment after one complete run."""
    done = run(demo_env, comfyui)
    assert done.returncode == 0, done.stderr
    return demo_env


def run(demo_env: DemoEnvironment, comfyui: StandIn, *flags: str, **settings: object) -> subprocess.CompletedProcess:
    environment = demo_env.environment(comfyui.url, **{"PYTHON": sys.executable, **QUICK, **settings})
    return subprocess.run([RUN_SH, *flags], env=environment, capture_output=True, text=True, cwd="/")


def count_files(folder: Path) -> dict[str, int]:
    """Number of files of each name in `folder`; hashes in the names are replaced."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]
    return Counter(re.sub(r"[0-9a-f]{12,}", "<hash>", name) for name in names)


def snapshot(*folders: Path) -> dict[Path, tuple[int, bytes]]:
    """Time of modification and contents of each file."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_run_writes_exactly_these_files(finished):
    assert count_files(finished.dataset) == FILES_IN_DATASET
    assert count_files(finished.output) == FILES_IN_OUTPUT


def test_every_image_has_its_manifest_line_and_a_caption_with_the_trigger_first(finished):
    lines = read_json_lines(finished.dataset / "manifest.jsonl")
    assert sorted(line["prompt"] for line in lines) == sorted(PROMPTS)
    for line in lines:
        image = finished.dataset / line["file"]
        assert sha256_of(image) == line["sha256"]
        tags = image.with_suffix(".txt").read_text(encoding="utf-8").strip().split(", ")
        assert tags[0] == TRIGGER_WORD
        assert len(tags) > 1
        assert TRIGGER_WORD not in tags[1:]


def test_lora_holds_the_three_tensors_of_every_module_that_comfyui_takes(finished):
    layers = {layer.kohya for layer in unet_layers() if ".attentions." in layer.diffusers}
    with safe_open(finished.lora, framework="numpy") as lora:
        tensors, about = Counter(key.partition(".")[0] for key in lora.keys()), lora.metadata()  # noqa: SIM118 (not a dict)
    assert len(tensors) == 722
    assert tensors.keys() == layers
    assert set(tensors.values()) == {3}
    assert about["modelspec.trigger_phrase"] == TRIGGER_WORD
    assert about["loracat_version"] == VERSION
    assert about["ss_num_train_images"] == str(IMAGES)


def test_second_run_sends_nothing_and_changes_nothing(finished, comfyui, forked_python):
    before, sent = snapshot(finished.dataset, finished.output), len(comfyui.requests)
    done = run(finished, comfyui, PYTHON=forked_python)
    assert done.returncode == 0
    assert "nothing was sent" in done.stdout
    assert done.stdout.count("nothing to do") == 2
    assert snapshot(finished.dataset, finished.output) == before
    assert comfyui.requests[sent:] == []


def test_check_of_a_complete_environment_returns_0_and_changes_nothing(finished, comfyui, forked_python):
    before = snapshot(finished.dataset, finished.output)
    done = run(finished, comfyui, "--check", PYTHON=forked_python)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert snapshot(finished.dataset, finished.output) == before


def test_check_names_everything_that_is_wrong_with_every_stage(finished, comfyui, tmp_path, forked_python):
    wrong = {
        "comfyui_workflow": tmp_path / "no-workflow.json",
        "face_reference": tmp_path / "no-face.png",
        "caption_model": "no-tagger",
        "base_model": "no-base-model",
    }
    done = run(finished, comfyui, "--check", PYTHON=forked_python, **wrong)
    assert done.returncode == 2
    for word in ("no-workflow.json", "no-face.png", "no-tagger", "no-base-model"):
        assert word in done.stderr
    assert "Traceback" not in done.stderr


def test_demo_ignores_what_a_user_wrote_into_the_settings_file(demo_env, tmp_path):
    mine = "[train.lora]\nlora_targets = 'attention'\n[train.processes]\nnum_processes = 2\n[caption]\ncaption_append = ['mine']\n"
    file = tmp_path / "mine.toml"
    file.write_text(mine)
    tables = make_dataclass("Tables", zip(TABLES, SECTIONS, strict=True))
    resolved = resolve(file, demo_env.environment("http://127.0.0.1:1", file), [], tables)
    assert {resolved.sources[key] for key in ("lora_targets", "num_processes", "caption_append")} == {"environment"}
    assert resolved.settings.caption.caption_append == ()


def written(folder: Path, content: object) -> Path:
    path = folder / "written.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def one_image(folder: Path) -> Path:
    """A data set with one image, as a user may bring it."""
    (folder / "images").mkdir()
    scene("portrait", 1, (300, 300)).save(folder / "images" / "one.png")
    return folder


@pytest.mark.parametrize(
    ("flag", "settings", "code", "message"),
    [
        ("--collect", lambda _: {"comfyui_workflow": "/nowhere/workflow.json"}, 2, "/nowhere/workflow.json"),
        ("--collect", lambda _: {"comfyui_workflow": WORKFLOWS / "ui_format_not_api.json"}, 2, "Save (API Format)"),
        ("--collect", lambda _: {"workflow_config": REPOSITORY / "config" / "workflow_config.json"}, 2, "image_loader_node"),
        ("--collect", lambda tmp: {"workflow_config": written(tmp, {"seed_node": "6"})}, 2, "but positive_prompt_node is not"),
        ("--collect", lambda tmp: {"prompts_file": written(tmp, [])}, 2, "prompts"),
        ("--collect", lambda tmp: {"prompts_file": written(tmp, [{"prompt": " "}])}, 2, "entry 1"),
        ("--collect", lambda _: {"comfyui_endpoint": "127.0.0.1:8188"}, 2, "http://"),
        ("--collect", lambda tmp: {"comfyui_endpoint": "http://127.0.0.1:9", "dataset_dir": tmp}, 4, "127.0.0.1:9"),
        ("--collect", lambda _: {"face_reference": RUN_SH}, 2, "face_reference"),
        ("--caption", lambda tmp: {"dataset_dir": tmp}, 3, "no images"),
        ("--caption", lambda tmp: {"dataset_dir": one_image(tmp), "caption_model": "Some/tagger"}, 5, "hf download Some/tagger"),
        ("--train", lambda _: {"output_name": "a/b"}, 2, "output_name"),
        (None, lambda _: {"global_seed": "lucky", "lora_rank": "big"}, 2, "'lucky' must be a whole number"),
        (None, lambda _: {"lora_rank": "0"}, 2, "lora_rank"),
        ("--tarin", lambda _: {}, 2, "--tarin"),
    ],
)
def test_wrong_input_ends_with_its_exit_code_and_one_message(
    demo_env, comfyui, tmp_path, forked_python, flag, settings, code, message
):
    done = run(demo_env, comfyui, *([flag] if flag else []), PYTHON=forked_python, **settings(tmp_path))
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith(("collect_images: ", "caption_images: ", "train_lora: ", "run.sh: "))


def test_shipped_workflow_mapping_and_prompts_are_understood_by_the_collector():
    problems: list[str] = []
    read = {name: json.loads((REPOSITORY / name).read_text(encoding="utf-8")) for name in SHIPPED}
    workflow = parse_workflow(read["workflow_api.json"], read["config/workflow_config.json"], problems)
    entries = parse_entries(read["prompts_example.json"], problems)
    assert problems == []
    assert len(workflow.output_nodes) >= 40
    assert not workflow.per_batch
    assert len(entries) == 40


def test_demo_does_not_empty_a_folder_that_it_did_not_create(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(SystemExit, match="not created by the demo"):
        empty_workspace(tmp_path)
    assert (tmp_path / "thesis.txt").exists()
    empty_workspace(tmp_path / "workspace")
    (tmp_path / "workspace" / "old.txt").touch()
    assert [path.name for path in empty_workspace(tmp_path / "workspace").iterdir()] == [".made-by-loracat-demo"]
    with pytest.raises(SystemExit, match=r"thesis\.txt: Not a directory; choose another folder with --workspace"):
        empty_workspace(tmp_path / "thesis.txt")


@pytest.mark.parametrize("name", ["caption", "collect", "report", "step", "train"])
def test_benchmarks_use_names_that_exist(name):
    assert callable(importlib.import_module(f"benchmarks.{name}").main)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["step", "/tmp/gone/sdxl"], 5, "benchmarks.step: base model '/tmp/gone/sdxl' is neither in "),
        (["ways", "/tmp/gone/sdxl"], 5, "benchmarks.ways: base model '/tmp/gone/sdxl' is neither in "),
        (["sample", "/tmp/gone/sdxl"], 5, "benchmarks.sample: base model '/tmp/gone/sdxl' is neither in "),
        (["limits"], "this benchmark needs an NVIDIA GPU", ""),
    ],
)
def test_a_benchmark_without_model_or_gpu_ends_with_a_message(capsys, monkeypatch, arguments, code, message):
    if arguments == ["limits"] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"benchmarks.{arguments[0]}", run_name="__main__")
    assert ended.value.code == code
    output = capsys.readouterr()
    assert output.err.startswith(message)
    assert "Traceback" not in output.err


def test_benchmarks_find_the_programs_whatever_the_environment_holds():
    """Without PYTHONPATH, as the docs call them."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", "import benchmarks, common.errors, training.config"]
    assert subprocess.run(command, cwd=REPOSITORY, env=clean).returncode == 0
