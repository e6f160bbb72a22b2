"""The metrics of every step: `metrics.jsonl`, and TensorBoard or Weights & Biases if they are enabled."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.errors import SettingsError
from common.files import naming_oserror, read_json_lines, write_bytes
from training.config import LoggingSettings
from training.data.buckets import OptimizerStep
from training.loop import Callback

Log = Callable[[dict[str, Any], int], None]
"""Records the values of an optimizer step: numbers, or the files of images."""
LIKENESS = "likeness"
"""Name of the value of a LoRA's sample images."""


@contextlib.contextmanager
def open_metrics(
    settings: LoggingSettings, name: str, metrics_file: Path, logs_folder: Path, next_step: int
) -> "Iterator[Metrics]":
    """The callback that records the metrics. A run that resumes at `next_step` drops what it is about to repeat.

    Weights & Biases is used only if an API key is set, so that it never prompts for one.
    """
    with contextlib.ExitStack() as closing:
        metrics = Metrics(metrics_file, next_step)
        closing.callback(metrics.close)
        if settings.tensorboard:
            metrics.logs.append(_tensorboard(logs_folder / name, next_step, closing))
        if settings.wandb_api_key:
            logs_folder.mkdir(parents=True, exist_ok=True)
            metrics.logs.append(_wandb(settings.wandb_project, name, logs_folder, closing))
        yield metrics


class Metrics(Callback):
    """Writes one JSON object per optimizer step, and passes its values on to `logs`."""

    def __init__(self, path: Path, next_step: int):
        lines = [line for line in read_json_lines(path) if isinstance(line.get("step"), int) and line["step"] < next_step]
        lines = [line for line in lines if LIKENESS not in line]  # the end of the run records it, of all its LoRAs
        write_bytes(path, "".join(json.dumps(line) + "\n" for line in lines).encode("utf-8"))
        self._path, self._file = path, path.open("a", encoding="utf-8")
        self.logs: list[Log] = []

    def after_step(self, step: OptimizerStep, values: dict[str, float]) -> None:
        self._record(step.number, values)

    after_validation = after_step

    def after_likeness(self, step: int, likeness: float) -> None:
        self._record(step, {LIKENESS: likeness})

    def _record(self, step: int, values: dict[str, float]) -> None:
        with naming_oserror(self._path):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        for log in self.logs:
            log(values, step)

    def after_samples(self, step: int, images: dict[str, Path]) -> None:
        for log in self.logs:
            log(images, step)

    def close(self) -> None:
        """Close the file, which writes what a full disk has refused before."""
        with naming_oserror(self._path):
            self._file.close()


def _tensorboard(folder: Path, next_step: int, closing: contextlib.ExitStack) -> Log:
    """Event files in `folder`, with one scalar for each number."""
    from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

    writer = SummaryWriter(folder, purge_step=next_step)
    closing.callback(writer.close)

    def log(values: dict[str, Any], step: int) -> None:
        for name, value in values.items():
            if isinstance(value, Path):
                writer.add_image(name, np.asarray(Image.open(value)), step, dataformats="HWC")
            else:
                writer.add_scalar(name, value, step)

    return log


def _wandb(project: str, name: str, folder: Path, closing: contextlib.ExitStack) -> Log:
    """A run of Weights & Biases, which reads WANDB_API_KEY itself. Raises SettingsError if it cannot log in."""
    import wandb  # takes seconds to import

    try:
        run = wandb.init(project=project, name=name, dir=folder)
    except (wandb.errors.Error, ValueError) as error:  # the latter for a variable of its own, such as WANDB_BASE_URL
        reason = ": ".join(line.strip() for line in str(error).splitlines()[:3])
        raise SettingsError(f"Weights & Biases: {reason}; check WANDB_API_KEY, or leave it empty to train without") from None
    closing.callback(run.finish)
    run.define_metric(LIKENESS, step_metric="likeness_step")  # it is known later, and a step cannot be logged after another

    def log(values: dict[str, Any], step: int) -> None:
        shown = {name: wandb.Image(str(value)) if isinstance(value, Path) else value for name, value in values.items()}
        if LIKENESS in values:
            run.log(shown | {"likeness_step": step})
        else:
            run.log(shown, step)

    return log
