"""The metrics of each step: always in the file, in TensorBoard and Weights & Biases if they are enabled."""

import json
import sys

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.errors import SettingsError
from training.callbacks.metrics import open_metrics
from training.config import LoggingSettings
from training.data.buckets import Bucket, OptimizerStep


@pytest.fixture
def record(tmp_path):
    """`record(steps, next_step, **settings)`: record a loss for each step and return the lines of metrics.jsonl."""

    def run(steps, next_step=0, **settings) -> list[dict]:
        file = tmp_path / "metrics.jsonl"
        with open_metrics(LoggingSettings(**settings), "mia", file, tmp_path / "logs", next_step) as metrics:
            for step in steps:
                metrics.after_step(OptimizerStep(step, 0, Bucket(64, 64), ()), {"loss": 1 / (step + 1), "lr": 1e-4})
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    return run


def test_one_line_per_step(record, tmp_path):
    assert record([0, 1]) == [{"step": 0, "loss": 1.0, "lr": 1e-4}, {"step": 1, "loss": 0.5, "lr": 1e-4}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_resumed_run_drops_the_lines_that_it_repeats(record, tmp_path):
    record([0, 1, 2, 3])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": "x"}\n{"no": "step"}\n')  # lines that LoRACat does not write
        file.write('{"step": 4, "lo')  # a line cut off by a kill
    assert [line["step"] for line in record([2, 3, 4], next_step=2)] == [0, 1, 2, 3, 4]


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    read = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_tensorboard_has_every_step_once_after_resuming(record, tmp_path):
    record([0, 1, 2], tensorboard=True)
    record([2, 3], next_step=2, tensorboard=True)
    shown = scalars(tmp_path / "logs" / "mia")
    assert shown.keys() == {"loss", "lr"}
    assert shown["loss"] == [(step, pytest.approx(1 / (step + 1))) for step in range(4)]


def test_likeness_is_logged_at_the_steps_of_its_loras_once_after_resuming(record, tmp_path):
    record([0, 1, 2, 3])
    file, logs = tmp_path / "metrics.jsonl", tmp_path / "logs"
    for next_step in (4, 4):  # killed after it was recorded, so that it is recorded again
        with open_metrics(LoggingSettings(tensorboard=True), "mia", file, logs, next_step) as metrics:
            for step, likeness in ((1, 0.5), (3, 0.625)):
                metrics.after_likeness(step, likeness)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line for line in lines if "likeness" in line] == [{"step": 1, "likeness": 0.5}, {"step": 3, "likeness": 0.625}]
    assert [line["step"] for line in lines if "loss" in line] == [0, 1, 2, 3]
    assert set(scalars(logs / "mia")["likeness"]) == {(1, 0.5), (3, 0.625)}


def test_sample_images_are_logged(tmp_path):
    file = tmp_path / "metrics.jsonl"
    Image.new("RGB", (64, 32), "red").save(tmp_path / "000005-01.png")
    with open_metrics(LoggingSettings(tensorboard=True), "mia", file, tmp_path / "logs", 0) as metrics:
        metrics.after_samples(7, {"samples/01": tmp_path / "000005-01.png"})
    read = EventAccumulator(str(tmp_path / "logs" / "mia")).Reload()
    (shown,) = read.Images("samples/01")
    assert (shown.step, shown.width, shown.height) == (7, 64, 32)
    assert file.read_text() == ""


def test_weights_and_biases_is_not_imported_without_a_key(record, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would fail
    record([0], wandb_api_key="")
    assert not (tmp_path / "logs").exists()


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """Weights & Biases in offline mode; its service ends with the test."""
    import wandb

    for name, value in {
        "MODE": "offline",
        "SILENT": "true",
        "DIR": tmp_path,
        "CONFIG_DIR": tmp_path,
        "CACHE_DIR": tmp_path,
    }.items():
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    yield wandb
    wandb.teardown()


@pytest.mark.filterwarnings("default")  # Weights & Biases' own
def test_weights_and_biases_records_the_steps_with_a_key(record, tmp_path, wandb, monkeypatch):
    key = "0123456789" * 4
    monkeypatch.setenv("WANDB_API_KEY", key)
    assert len(record([0, 1], wandb_api_key=key, wandb_project="faces")) == 2
    Image.new("RGB", (64, 32), "red").save(tmp_path / "image.png")
    logging = LoggingSettings(wandb_api_key=key, wandb_project="faces")
    with open_metrics(logging, "mia", tmp_path / "metrics.jsonl", tmp_path / "logs2", 0) as metrics:
        metrics.after_samples(1, {"samples/01": tmp_path / "image.png"})
        metrics.after_likeness(0, 0.625)  # of an earlier step: it is not dropped
        metrics.after_likeness(1, 0.75)
    assert len(list((tmp_path / "logs2").rglob("media/images/samples/*.png"))) == 1
    wandb.teardown()  # its service may still be writing when the run is finished
    (likeness,) = (tmp_path / "logs2" / "wandb").glob("offline-run-*/run-*.wandb")
    content = likeness.read_bytes()
    assert (b"0.625" in content, b"0.75" in content) == (True, True)
    (record,) = (tmp_path / "logs" / "wandb").glob("offline-run-*/run-*.wandb")
    content = record.read_bytes()
    assert b"faces" in content
    assert b"mia" in content
    assert content.count(b"loss") >= 2
    assert key.encode() not in content


@pytest.mark.filterwarnings("default")
def test_an_invalid_key_is_refused_in_one_line(record, tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(SettingsError, match=r"Weights & Biases: .*check WANDB_API_KEY, or leave it empty") as refused:
        record([0], wandb_api_key="short")
    assert "\n" not in str(refused.value)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.filterwarnings("default")
def test_an_invalid_address_of_its_server_is_refused_in_one_line(record, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:port")
    with pytest.raises(SettingsError, match=r"Weights & Biases: .*base_url.*invalid port number") as refused:
        record([0], wandb_api_key="0123456789" * 4)
    assert "\n" not in str(refused.value)
