"""The metrics of every step: `metrics.jsonl`, and TensorBoard or Weights & Biases if they are enabled."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from common.errors import SettingsError
from common.files import naming_oserror, read_json_lines, write_text
from training.config import LoggingSettings
from training.data.buckets import OptimizerStep
from training.monitor.callbacks import Callback


class Tracker(Protocol):
    """Something that records the metrics of optimizer steps."""

    def log(self, values: dict[str, Any], step: int) -> None:
        """Record the values of optimizer step `step`."""


@contextlib.contextmanager
def open_metrics(
    settings: LoggingSettings, name: str, metrics_file: Path, logs_folder: Path, next_step: int
) -> "Iterator[TrackerGroup]":
    """The trackers that `settings` enable; they are closed when the block ends.

    The file is always written. A run that resumes at `next_step` drops what it is about to repeat. Weights & Biases is used only
    if an API key is set, so that it never prompts for one.
    """
    with contextlib.ExitStack() as closing:
        trackers: list[Tracker] = [MetricsFile(metrics_file, next_step, closing)]
        if settings.tensorboard:
            trackers.append(TensorBoard(logs_folder / name, next_step, closing))
        if settings.wandb_api_key:
            logs_folder.mkdir(parents=True, exist_ok=True)
            trackers.append(_start_wandb(settings.wandb_project, name, logs_folder, closing))
        yield TrackerGroup(trackers)


class TrackerGroup(Callback):
    """Passes the metrics of each step on to several trackers."""

    def __init__(self, trackers: list[Tracker]):
        self._trackers = trackers

    def after_step(self, step: OptimizerStep, values: dict[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(values, step.number)


class MetricsFile:
    """One JSON object per optimizer step."""

    def __init__(self, path: Path, next_step: int, closing: contextlib.ExitStack):
        lines = [line for line in read_json_lines(path) if isinstance(line.get("step"), int) and line["step"] < next_step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        self._path, self._file = path, path.open("a", encoding="utf-8")
        closing.callback(self._close)

    def log(self, values: dict[str, Any], step: int) -> None:
        with naming_oserror(self._path):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()

    def _close(self) -> None:
        with naming_oserror(self._path):
            self._file.close()


class TensorBoard:
    """Event files in `folder`, one scalar per value."""

    def __init__(self, folder: Path, next_step: int, closing: contextlib.ExitStack):
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

        self._writer = SummaryWriter(folder, purge_step=next_step)
        closing.callback(self._writer.close)

    def log(self, values: dict[str, Any], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)


def _start_wandb(project: str, name: str, folder: Path, closing: contextlib.ExitStack) -> Tracker:
    """A run of Weights & Biases, which reads WANDB_API_KEY itself. Raises SettingsError if it cannot log in."""
    import wandb  # takes seconds to import

    try:
        run = wandb.init(project=project, name=name, dir=folder)
    except wandb.errors.Error as error:
        reason = str(error).partition("\n")[0]
        raise SettingsError(f"Weights & Biases: {reason}; check WANDB_API_KEY, or leave it empty to train without") from None
    closing.callback(run.finish)
    return run
