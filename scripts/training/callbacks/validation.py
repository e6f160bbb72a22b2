"""The validation loss: that of the held-out images, on the same noise and timesteps each time. Training is not changed by it."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from training.data.batches import Batch, BatchReader, Sample, make_batch
from training.data.buckets import OptimizerStep
from training.loop import Callback, Progress, smoothed

STRATA = 8
"""Timesteps per image, one from each eighth of the noise schedule: the loss differs tenfold between them."""
_POSITION = 2**62
"""Where the draws of the held-out images begin; no run is so long that training would meet them."""


@dataclass(frozen=True)
class Validator(Callback):
    """Measures the loss of the held-out images at the end of epochs."""

    reader: BatchReader
    """Reads the held-out images, without dropping a caption."""
    evaluate: Callable[[Iterable[Batch]], float]
    """The sum of the weighted losses of batches."""
    is_due: Callable[[int, int], bool] = lambda before, after: True
    """Whether to measure when the second number of epochs is complete and the first was."""
    trackers: Sequence[Callback] = ()
    """These record the result."""

    def after_epoch(self, step: OptimizerStep, epochs: int, progress: Progress) -> tuple[Progress, str]:
        if not self.is_due(step.epoch, epochs):
            return progress, ""
        loss = self.reader.group.all_reduce_sum(self.evaluate(self.batches()))
        progress = replace(progress, validations=progress.validations | {epochs: loss})
        average = smoothed(progress.validations)[epochs]
        for tracker in self.trackers:
            tracker.after_validation(step, {"epoch": step.epoch, "validation_loss": loss, "validation_loss_smoothed": average})
        return progress, f"  validation {loss:.4f} (smoothed {average:.4f})"

    def batches(self) -> Iterator[Batch]:
        """This process's micro-batches, of one shape each. Their weights make the mean over all held-out images and STRATA
        timesteps of each."""
        examples, size = self.reader.examples, self.reader.micro_batch
        by_bucket = defaultdict(list)
        for index, example in enumerate(examples):
            by_bucket[example.placement.bucket] += [(index, stratum) for stratum in range(STRATA)]
        parts = [items[i : i + size] for _, items in sorted(by_bucket.items()) for i in range(0, len(items), size)]
        for part in parts[self.reader.group.rank :: self.reader.group.world_size]:
            samples = [self._sample(index, stratum) for index, stratum in part]
            yield make_batch(samples, [1.0 / (len(examples) * STRATA)] * len(samples), size)

    def _sample(self, index: int, stratum: int) -> Sample:
        """Noise and timestep are fixed; the timesteps of the images are spread over the stratum of their distribution. The caption
        is its first variant, and the image is not mirrored."""
        examples, timesteps = self.reader.examples, self.reader.timesteps
        timestep_at = self.reader.timestep_at or (lambda quantile: int(quantile * timesteps))
        sample = self.reader.sample(replace(examples[index], variants=1, mirrored=None), _POSITION + index * STRATA + stratum)
        within = (index + 0.5) / len(examples)
        return sample | {"timesteps": torch.tensor(timestep_at((stratum + within) / STRATA))}
