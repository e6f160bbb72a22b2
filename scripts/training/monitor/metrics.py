"""One line per step: metrics.jsonl, and TensorBoard or Weights & Biases when they are wanted."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from common.errors import SettingsError
from common.files import naming_oserror, read_json_lines, write_text
from training.config import LoggingSettings
from training.data.buckets import OptimizerStep
from training.monitor.callbacks import Callback


class Tracker(Protocol):
    """Somebody who is told about the steps."""

    def log(self, values: dict[str, Any], step: int) -> None:
        """Take the values of optimizer step `step`."""

    def finish(self) -> None:
        """Write what is left and close."""


class MetricsFile:
    """`metrics.jsonl`: one JSON object per optimizer step. A run that continues drops the lines it is about to repeat."""

    def __init__(self, path: Path, next_step: int):
        lines = read_json_lines(path)
        kept = [line for line in lines if isinstance(line.get("step"), int) and line["step"] < next_step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._path, self._file = path, path.open("a", encoding="utf-8")

    def log(self, values: dict[str, Any], step: int) -> None:
        with naming_oserror(self._path):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()

    def finish(self) -> None:
        with naming_oserror(self._path):
            self._file.close()


class TensorBoard:
    """Event files in `folder`. A run that continues drops the steps that it is about to repeat."""

    def __init__(self, folder: Path, next_step: int):
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import, and most runs want none

        self._writer = SummaryWriter(folder, purge_step=next_step)

    def log(self, values: dict[str, Any], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, which reads WANDB_API_KEY itself. Raises SettingsError if it does not let us in."""

    def __init__(self, project: str, name: str, folder: Path):
        import wandb  # takes seconds to import, and most runs want none

        try:
            self._run = wandb.init(project=project, name=name, dir=folder)
        except wandb.errors.Error as error:
            reason = str(error).partition("\n")[0]
            raise SettingsError(f"Weights & Biases: {reason}; mend WANDB_API_KEY, or leave it empty to train without") from None

    def log(self, values: dict[str, Any], step: int) -> None:
        self._run.log(values, step=step)

    def finish(self) -> None:
        self._run.finish()


class TrackerGroup(Callback):
    """Passes the numbers of each step to several trackers."""

    def __init__(self, trackers: Sequence[Tracker]):
        self._trackers = trackers

    def after_step(self, step: OptimizerStep, values: dict[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(values, step.number)


@contextlib.contextmanager
def open_metrics(
    settings: LoggingSettings, name: str, metrics_file: Path, logs_folder: Path, next_step: int
) -> Iterator[TrackerGroup]:
    """The trackers that `settings` ask for, closed at the end: the file always; W&B only when a key is set, so that it
    never stops to ask for one."""
    with contextlib.ExitStack() as opened:
        trackers: list[Tracker] = []

        def add(tracker: Tracker) -> None:
            trackers.append(tracker)
            opened.callback(tracker.finish)

        add(MetricsFile(metrics_file, next_step))
        if settings.tensorboard:
            add(TensorBoard(logs_folder / name, next_step))
        if settings.wandb_api_key:
            logs_folder.mkdir(parents=True, exist_ok=True)
            add(WeightsAndBiases(settings.wandb_project, name, logs_folder))
        yield TrackerGroup(trackers)
