"""Which images never fit, and which are learned at once, from the losses that the steps have computed anyway.

The loss depends on the timestep far more than on the image. An image is therefore compared with what the others have at the same
timesteps: its relative loss is 1 if it has as much. With several processes, the samples of the main one count.
"""

import json
from array import array
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import numpy as np

from common.errors import abbreviated
from common.files import naming_oserror, read_json_lines, write_bytes, write_json
from training.data.buckets import OptimizerStep
from training.loop import Callback, Progress

SAMPLES_PER_BIN, MAX_BINS = 24, 40
"""Of neighbouring timesteps, between which the usual loss is interpolated."""
ROUNDS = 8
"""How often the usual loss and the relative losses are computed from each other; they hardly change after the fifth."""
MIN_SAMPLES = 4
"""Of an image whose relative loss says anything."""
OUTLIER, LEAST_FACTOR = 3.5, 1.15
"""An image stands out if its relative loss is so many robust standard deviations, and by this factor, from the median."""


def relative_losses(images: np.ndarray, timesteps: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """[number of images]: the relative loss of each image, from the (image, timestep, loss) of each sample; NaN for an image with
    fewer than MIN_SAMPLES.

    The logarithm of a loss is taken for the sum of what is usual at the timestep and what is special about the image.
    """
    logs = np.log(np.maximum(losses.astype(float), 1e-12))
    counts = np.bincount(images)
    bins = np.array_split(np.argsort(timesteps, kind="stable"), np.clip(len(logs) // SAMPLES_PER_BIN, 1, MAX_BINS))
    centers = [timesteps[part].mean() for part in bins]
    special = np.zeros(len(counts))
    for _ in range(ROUNDS):
        rest = logs - special[images]
        usual = np.interp(timesteps, centers, [rest[part].mean() for part in bins])
        special = np.bincount(images, logs - usual) / np.maximum(counts, 1)
    special[counts < MIN_SAMPLES] = np.nan
    return np.exp(special - np.nanmedian(special)) if np.isfinite(special).any() else special


def outliers(relative: np.ndarray) -> tuple[list[int], list[int]]:
    """The images with an unusually high relative loss, the highest first, and those with an unusually low one, the lowest first."""
    known = np.flatnonzero(np.isfinite(relative))
    special = np.log(relative[known])
    deviation = 1.4826 * np.median(np.abs(special)) if len(known) else 0.0
    limit = max(OUTLIER * deviation, np.log(LEAST_FACTOR))
    order = known[np.argsort(special)]
    return [i for i in order[::-1] if np.log(relative[i]) > limit], [i for i in order if np.log(relative[i]) < -limit]


class ImageLosses(Callback, AbstractContextManager):
    """Records the loss of every sample in the file `samples`, and writes the relative losses of the images into the file `record`:
    whenever `is_due`, and at the end, with a line for the log.

    A run that resumes at `next_step` drops what it is about to repeat. `indices` are the images of a step's samples, in order.
    """

    def __init__(
        self,
        samples: Path,
        record: Path,
        names: Sequence[str],
        indices: Callable[[OptimizerStep], list[int]],
        is_due: Callable[[int, int], bool],
        next_step: int,
    ):
        self._record, self._indices, self._is_due = record, indices, is_due
        self._names = list(dict.fromkeys(names))
        number = {name: index for index, name in enumerate(self._names)}
        self._image_of = [number[name] for name in names]
        """Index of an example -> its image; an image is an example for each of its resolutions."""
        self._images, self._timesteps, self._losses = array("l"), array("l"), array("d")
        kept = []
        for line in read_json_lines(samples):
            with suppress(KeyError, TypeError, ValueError, IndexError, OverflowError):  # a line that something else wrote
                if line["step"] < next_step:
                    self._add(line["samples"])
                    kept.append(json.dumps(line) + "\n")
        write_bytes(samples, "".join(kept).encode("utf-8"))
        self._path, self._file = samples, samples.open("a", encoding="utf-8")

    def after_losses(self, step: OptimizerStep, samples: Sequence[tuple[int, float]]) -> None:
        indices = self._indices(step)
        of_images = samples[: len(indices)]  # regularization images come after them
        rows = [[index, time, float(f"{loss:.6g}")] for index, (time, loss) in zip(indices, of_images, strict=True)]
        self._add(rows)
        with naming_oserror(self._path):
            self._file.write(json.dumps({"step": step.number, "samples": rows}) + "\n")
            self._file.flush()

    def after_epoch(self, step: OptimizerStep, epochs: int, progress: Progress) -> tuple[Progress, str]:
        if self._is_due(step.epoch, epochs):
            self.write()
        return progress, ""

    def write(self) -> str:
        """Write the record; returns the line for the log."""
        images, timesteps, losses = (np.array(each) for each in (self._images, self._timesteps, self._losses))
        relative = relative_losses(images, timesteps, losses) if len(images) else np.empty(0)
        high, low = outliers(relative)
        found = {self._names[index]: round(float(value), 3) for index, value in enumerate(relative) if np.isfinite(value)}
        named = [[self._names[index] for index in part] for part in (high, low)]
        write_json(self._record, {"relative_loss": found, "never_fit": named[0], "learned_at_once": named[1]})
        if not found:
            return "loss per image: too few samples to compare them"
        parts = [
            f"{title}: {abbreviated([f'{name} ({found[name]:.2f})' for name in names])}"
            for title, names in zip(("never fit", "learned at once"), named, strict=True)
            if names
        ]
        span = f"{min(found.values()):.2f} to {max(found.values()):.2f} of the usual loss"
        return f"loss per image: {span}; {'; '.join(parts) or 'none stands out'}"

    def __exit__(self, kind, *_) -> None:
        with naming_oserror(self._path):
            self._file.close()
        if kind is None:
            print(self.write(), flush=True)

    def _add(self, rows: Sequence[Sequence[float]]) -> None:
        values = [(self._image_of[index], int(timestep), float(loss)) for index, timestep, loss in rows]
        for known, new in zip((self._images, self._timesteps, self._losses), zip(*values, strict=True), strict=False):
            known.extend(new)
