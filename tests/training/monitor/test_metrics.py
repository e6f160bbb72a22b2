"""Who is told about the steps: the file always, TensorBoard and Weights & Biases when they are wanted."""

import json
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.errors import SettingsError
from training.config import LoggingSettings
from training.data.buckets import Bucket, OptimizerStep
from training.monitor.metrics import open_metrics


@pytest.fixture
def told(tmp_path):
    """`told(steps, next_step, **settings)`: tell the loss of each step; the lines of metrics.jsonl afterwards."""

    def tell(steps, next_step=0, **settings) -> list[dict]:
        file = tmp_path / "metrics.jsonl"
        with open_metrics(LoggingSettings(**settings), "mia", file, tmp_path / "logs", next_step) as metrics:
            for step in steps:
                metrics.after_step(OptimizerStep(step, 0, Bucket(64, 64), ()), {"loss": 1 / (step + 1), "lr": 1e-4})
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    return tell


def test_one_line_per_step(told, tmp_path):
    assert told([0, 1]) == [{"step": 0, "loss": 1.0, "lr": 1e-4}, {"step": 1, "loss": 0.5, "lr": 1e-4}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_that_continues_drops_what_it_repeats(told, tmp_path):
    told([0, 1, 2, 3])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": "x"}\n{"no": "step"}\n')  # what nobody wrote
        file.write('{"step": 4, "lo')  # what a kill left
    assert [line["step"] for line in told([2, 3, 4], next_step=2)] == [0, 1, 2, 3, 4]


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    read = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_tensorboard_shows_every_step_once_when_a_run_continues(told, tmp_path):
    told([0, 1, 2], tensorboard=True)
    told([2, 3], next_step=2, tensorboard=True)
    shown = scalars(tmp_path / "logs" / "mia")
    assert shown.keys() == {"loss", "lr"}
    assert shown["loss"] == [(step, pytest.approx(1 / (step + 1))) for step in range(4)]


def test_without_a_key_nobody_thinks_of_weights_and_biases(told, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would fail
    told([0], wandb_api_key="")
    assert not (tmp_path / "logs").exists()


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """Weights & Biases without a network; its service ends with the test."""
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
def test_with_a_key_the_steps_reach_weights_and_biases(told, tmp_path, wandb, monkeypatch):
    key = "0123456789" * 4
    monkeypatch.setenv("WANDB_API_KEY", key)
    assert len(told([0, 1], wandb_api_key=key, wandb_project="faces")) == 2
    wandb.teardown()  # its service may still be writing when the run is finished
    (record,) = (tmp_path / "logs" / "wandb").glob("offline-run-*/run-*.wandb")
    content = record.read_bytes()
    assert b"faces" in content
    assert b"mia" in content
    assert content.count(b"loss") >= 2
    assert key.encode() not in content


@pytest.mark.filterwarnings("default")
def test_a_key_that_is_none_is_refused_in_one_line(told, tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(SettingsError, match=r"Weights & Biases: .*check WANDB_API_KEY, or leave it empty") as refused:
        told([0], wandb_api_key="short")
    assert "\n" not in str(refused.value)
    assert (tmp_path / "metrics.jsonl").read_text() == ""
