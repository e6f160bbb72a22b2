"""(seed, position in the run) -> everything random about one sample. No generator state is carried anywhere.

Philox is counter-based (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): the seed is its key and the
position its counter, so any sample's numbers can be drawn at any time, in any process, in any order.

The run's order -> batches of tensors, read from the caches and drawn from the seed. A pure function of both.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from training.data.buckets import OptimizerStep
from training.data.cache import CachedExample, read_embedding, read_latents

TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class SampleRandomness:
    """The random numbers of one sample; tensors are fp32 on the CPU."""

    timestep: int
    """Uniform in 0 .. 999."""
    variant: int | None
    """Which of the caption's variants; None: the empty caption."""
    offset: torch.Tensor
    """[C, 1, 1], standard normal: the direction of the noise offset."""
    latent_noise: torch.Tensor
    """[C, h, w], standard normal: samples the VAE's posterior."""
    noise: torch.Tensor
    """[C, h, w], standard normal: what is added to the latents."""


def draw(seed: int, position: int, latent_shape: tuple[int, int, int], variants: int, caption_dropout: float) -> SampleRandomness:
    """The draw of the sample at `position` (optimizer step x global batch + slot) with latents of `latent_shape` (C, h, w)."""
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, position, 0]))
    timestep = int(generator.integers(TRAIN_TIMESTEPS))
    dropped = generator.random() < caption_dropout
    variant = int(generator.integers(variants))
    return SampleRandomness(
        timestep=timestep,
        variant=None if dropped else variant,
        offset=_normal(generator, (latent_shape[0], 1, 1)),
        latent_noise=_normal(generator, latent_shape),
        noise=_normal(generator, latent_shape),
    )


def _normal(generator: np.random.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B samples of one shape. Floats are fp32, except the embeddings, which have the UNet's dtype."""

    mean: torch.Tensor
    """[B, C, h, w]: mean of the VAE's posterior."""
    log_variance: torch.Tensor
    """[B, C, h, w]"""
    latent_noise: torch.Tensor
    """[B, C, h, w]"""
    noise: torch.Tensor
    """[B, C, h, w]"""
    offset: torch.Tensor
    """[B, C, 1, 1]"""
    timesteps: torch.Tensor
    """[B], int64"""
    hidden: torch.Tensor
    """[B, tokens, D]: hidden states of both text encoders."""
    pooled: torch.Tensor
    """[B, P]: pooled embedding of the second encoder."""
    add_time_ids: torch.Tensor
    """[B, 6]"""
    weights: torch.Tensor
    """[B]: share of each sample in the loss of the optimizer step; 0 for padding."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        return replace(self, **{part.name: getattr(self, part.name).to(device, non_blocking=True) for part in fields(self)})

    def pinned(self) -> "Batch":
        """The same batch in page-locked memory, from which a copy to the GPU runs beside its work."""
        return replace(self, **{part.name: getattr(self, part.name).pin_memory() for part in fields(self)})


@dataclass(frozen=True)
class BatchReader:
    """Makes the micro-batches of any optimizer step of the run, in any order."""

    examples: Sequence[CachedExample]
    empty_caption: Path
    seed: int
    caption_dropout: float
    micro_batch: int
    global_batch: int
    pin: bool
    """Page-lock the batches, for a GPU."""
    process: int = 0
    """Which of the `processes` that share each optimizer step this one is."""
    processes: int = 1

    def __call__(self, step: OptimizerStep) -> list[Batch]:
        """This process's micro-batches of `step`, all of `micro_batch` samples: every `processes`-th, at least one. What is
        missing is filled up with samples of weight 0."""
        slots = list(enumerate(step.examples))
        parts = [slots[start : start + self.micro_batch] for start in range(0, len(slots), self.micro_batch)]
        return [self._batch(step, part) for part in parts[self.process :: self.processes] or [[]]]

    def _batch(self, step: OptimizerStep, slots: Sequence[tuple[int, int]]) -> Batch:
        """The micro-batch of these slots and their examples. Its weights are shares of the whole step in all processes."""
        weights = [1.0 / len(step.examples)] * len(slots) or [0.0]
        samples = [self._sample(index, step.number * self.global_batch + slot) for slot, index in slots or [(0, step.examples[0])]]
        batch = batch_of(samples, weights, self.micro_batch)
        return batch.pinned() if self.pin else batch

    def names(self, step: OptimizerStep) -> str:
        """The images of `step`, for messages."""
        return ", ".join(sorted({self.examples[index].name for index in step.examples}))

    def _sample(self, index: int, position: int) -> tuple[torch.Tensor, ...]:
        example = self.examples[index]

        def drawn(shape: tuple[int, int, int]) -> SampleRandomness:
            return draw(self.seed, position, shape, example.variants, self.caption_dropout)

        return read_sample(example, drawn, self.empty_caption)


def read_sample(
    example: CachedExample, drawn_for: Callable[[tuple[int, int, int]], SampleRandomness], empty_caption: Path
) -> tuple[torch.Tensor, ...]:
    """The parts of one sample in the order of Batch's fields, but for its weight; `drawn_for` gets the latents' shape."""
    mean, log_variance = read_latents(example.latents)
    drawn = drawn_for(tuple(mean.shape))
    captions, variant = (empty_caption, 0) if drawn.variant is None else (example.captions, drawn.variant)
    hidden, pooled = read_embedding(captions, variant)
    time_ids = torch.tensor(example.placement.add_time_ids, dtype=torch.float32)
    timestep = torch.tensor(drawn.timestep)
    return mean, log_variance, drawn.latent_noise, drawn.noise, drawn.offset, timestep, hidden, pooled, time_ids


def batch_of(samples: Sequence[tuple[torch.Tensor, ...]], weights: Sequence[float], size: int) -> Batch:
    """The batch of `size` samples that begins with `samples`; the rest is filled up with the last one at weight 0."""
    padding = size - len(samples)
    parts = map(torch.stack, zip(*samples, *[samples[-1]] * padding, strict=True))
    return Batch(*parts, weights=torch.tensor([*weights, *[0.0] * padding]))
