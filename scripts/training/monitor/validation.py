"""The loss of the held-out images, on the same noise and timesteps each time; nothing of the training is touched."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch

from training.data.batches import TRAIN_TIMESTEPS, Batch, CachedExample, SampleRandomness, batch_of, draw, read_sample

STRATA = 8
"""Timesteps per image, one from each eighth of the noise schedule: the loss differs tenfold between them."""


_POSITION = 2**62
"""Where the draws of the held-out images begin; no run is so long that training would meet them."""


@dataclass(frozen=True)
class Validator:
    """Measures the loss of `examples` in micro-batches, of which `evaluate` takes the weighted losses."""

    examples: Sequence[CachedExample]
    empty_caption: Path
    seed: int
    micro_batch: int
    evaluate: Callable[[Iterable[Batch]], float]
    process: int = 0
    """Which of the `processes` that share the work this one is."""
    processes: int = 1

    def __call__(self) -> float:
        """This process's part of the mean loss over all held-out images and STRATA timesteps of each."""
        return self.evaluate(self._batches())

    def _batches(self) -> Iterator[Batch]:
        for part in self._parts()[self.process :: self.processes]:
            samples = [self._sample(index, stratum) for index, stratum in part]
            yield batch_of(samples, [1.0 / (len(self.examples) * STRATA)] * len(samples), self.micro_batch)

    def _parts(self) -> list[list[tuple[int, int]]]:
        """Every (example, stratum), cut into micro-batches of one shape each."""

        def bucket(index: int):
            return self.examples[index].placement.bucket

        parts = []
        for _, same in groupby(sorted(range(len(self.examples)), key=bucket), key=bucket):
            items = [(index, stratum) for index in same for stratum in range(STRATA)]
            parts += [items[start : start + self.micro_batch] for start in range(0, len(items), self.micro_batch)]
        return parts

    def _sample(self, index: int, stratum: int) -> tuple[torch.Tensor, ...]:
        """Fixed noise; the timesteps of the images lie between each other's. The caption is its first variant."""
        within = (index + 0.5) / len(self.examples)

        def fixed(shape: tuple[int, int, int]) -> SampleRandomness:
            drawn = draw(self.seed, _POSITION + index * STRATA + stratum, shape, variants=1, caption_dropout=0.0)
            return replace(drawn, timestep=int((stratum + within) / STRATA * TRAIN_TIMESTEPS))

        return read_sample(self.examples[index], fixed, self.empty_caption)
