"""One line per step: metrics.jsonl, and TensorBoard or Weights & Biases when they are wanted."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from accelerate.tracking import TensorBoardTracker, WandBTracker

from dataset_folder import read_json_lines, write_text
from training.config import LoggingSettings


class Tracker(Protocol):
    """Somebody who is told about the steps."""

    def log(self, values: dict[str, Any], step: int) -> None:
        """Take the values of optimizer step `step`."""

    def finish(self) -> None:
        """Write what is left and close."""


class MetricsFile:
    """`metrics.jsonl`: one JSON object per optimizer step. A run that continues drops the lines it is about to repeat."""

    def __init__(self, path: Path, next_step: int):
        kept = [line for line in read_json_lines(path) if line.get("step", next_step) < next_step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def log(self, values: dict[str, Any], step: int) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def finish(self) -> None:
        self._file.close()


class AccelerateTracker:
    """One of accelerate's trackers."""

    def __init__(self, tracker: TensorBoardTracker | WandBTracker):
        self._tracker = tracker
        self._tracker.start()

    def log(self, values: dict[str, Any], step: int) -> None:
        self._tracker.log(values, step=step)

    def finish(self) -> None:
        self._tracker.finish()


class Everybody:
    """Tells each of several trackers; with none of them it is the null tracker."""

    def __init__(self, trackers: Sequence[Tracker]):
        self._trackers = trackers

    def log(self, values: dict[str, Any], step: int) -> None:
        for tracker in self._trackers:
            tracker.log(values, step)

    def finish(self) -> None:
        for tracker in self._trackers:
            tracker.finish()


@contextlib.contextmanager
def open_metrics(settings: LoggingSettings, name: str, metrics_file: Path, logs_folder: Path, next_step: int) -> Iterator[Tracker]:
    """The trackers that `settings` ask for, closed at the end: the file always; W&B only when a key is set, so that it
    never stops to ask for one."""
    trackers: list[Tracker] = [MetricsFile(metrics_file, next_step)]
    if settings.tensorboard or settings.wandb_api_key:
        logs_folder.mkdir(parents=True, exist_ok=True)
    if settings.tensorboard:
        trackers.append(AccelerateTracker(TensorBoardTracker(name, logging_dir=logs_folder)))
    if settings.wandb_api_key:
        trackers.append(AccelerateTracker(WandBTracker(settings.wandb_project, name=name, dir=str(logs_folder))))
    everybody = Everybody(trackers)
    try:
        yield everybody
    finally:
        everybody.finish()
