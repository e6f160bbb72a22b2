"""The validation loss: that of the held-out images, on the same noise and timesteps each time. Training is not changed by it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch

from training.data.batches import Batch, Sample, make_batch, read_sample
from training.data.buckets import OptimizerStep
from training.data.cache import CachedExample
from training.monitor.callbacks import Callback, Progress, Validation, smoothed

STRATA = 8
"""Timesteps per image, one from each eighth of the noise schedule: the loss differs tenfold between them."""


_POSITION = 2**62
"""Where the draws of the held-out images begin; no run is so long that training would meet them."""


@dataclass(frozen=True)
class Validator(Callback):
    """Measures the loss of `examples` in micro-batches, of which `evaluate` takes the weighted losses, at the end of epochs."""

    examples: Sequence[CachedExample]
    empty_caption: Path
    seed: int
    micro_batch: int
    timesteps: int
    """Length of the base model's noise schedule."""
    evaluate: Callable[[Iterable[Batch]], float]
    rank: int = 0
    """Which of the `world_size` processes that share the work this one is."""
    world_size: int = 1
    all_reduce_sum: Callable[[float], float] = float
    """Adds up the parts of all processes."""
    is_due: Callable[[int, int], bool] = lambda before, after: True
    """Whether to measure when the second number of epochs is complete and the first was."""
    trackers: Sequence[Callback] = ()
    """These record the result."""

    def after_epoch(self, step: OptimizerStep, epochs: int, progress: Progress) -> tuple[Progress, str]:
        if not self.is_due(step.epoch, epochs):
            return progress, ""
        loss = self.all_reduce_sum(self())
        progress = replace(progress, validations=(*progress.validations, Validation(epochs, loss)))
        average = smoothed(progress.validations)[-1].loss
        for tracker in self.trackers:
            tracker.after_validation(step, {"epoch": step.epoch, "validation_loss": loss, "validation_loss_smoothed": average})
        return progress, f"  validation {loss:.4f} (smoothed {average:.4f})"

    def __call__(self) -> float:
        """This process's part of the mean loss over all held-out images and STRATA timesteps of each."""
        return self.evaluate(self._batches())

    def _batches(self) -> Iterator[Batch]:
        for part in self._parts()[self.rank :: self.world_size]:
            samples = [self._sample(index, stratum) for index, stratum in part]
            yield make_batch(samples, [1.0 / (len(self.examples) * STRATA)] * len(samples), self.micro_batch)

    def _parts(self) -> list[list[tuple[int, int]]]:
        """Every (example, stratum), cut into micro-batches of one shape each."""

        def bucket(index: int):
            return self.examples[index].placement.bucket

        parts = []
        for _, same in groupby(sorted(range(len(self.examples)), key=bucket), key=bucket):
            items = [(index, stratum) for index in same for stratum in range(STRATA)]
            parts += [items[start : start + self.micro_batch] for start in range(0, len(items), self.micro_batch)]
        return parts

    def _sample(self, index: int, stratum: int) -> Sample:
        """Noise and timestep are fixed; the timesteps of the images are spread over the stratum. The caption is its first
        variant."""
        example = replace(self.examples[index], variants=1)
        position = _POSITION + index * STRATA + stratum
        sample = read_sample(
            example, self.empty_caption, seed=self.seed, position=position, caption_dropout=0.0, timesteps=self.timesteps
        )
        within = (index + 0.5) / len(self.examples)
        return sample | {"timesteps": torch.tensor(int((stratum + within) / STRATA * self.timesteps))}
