"""The run's order -> batches of tensors, read from the cache; noise, timesteps and caption variants are drawn from the seed.

Everything random about a sample is a pure function of (seed, position in the run); no generator state is kept. Philox is
counter-based (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): the seed is its key and the position its
counter, so the numbers of any sample can be drawn at any time, in any process and in any order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from training.data.buckets import OptimizerStep
from training.data.cache import CachedExample, read_embedding, read_latents

Sample = dict[str, torch.Tensor]
"""One sample under the names of Batch's fields, without the batch dimension and without its weight."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B samples of one shape. Floats are fp32, except the embeddings, which have the UNet's dtype.

    A field is filled in by `read_sample` under the same name; everything else goes through the fields by name.
    """

    mean: torch.Tensor
    """[B, C, h, w]: mean of the VAE's posterior."""
    log_variance: torch.Tensor
    """[B, C, h, w]"""
    latent_noise: torch.Tensor
    """[B, C, h, w]: samples the VAE's posterior."""
    noise: torch.Tensor
    """[B, C, h, w]: is added to the latents."""
    offset: torch.Tensor
    """[B, C, 1, 1]: direction of the noise offset."""
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
        return Batch(**{name: tensor.to(device, non_blocking=True) for name, tensor in vars(self).items()})

    def pinned(self) -> "Batch":
        """The same batch in page-locked memory, from which it is copied to the GPU while the GPU computes."""
        return Batch(**{name: tensor.pin_memory() for name, tensor in vars(self).items()})


@dataclass(frozen=True)
class BatchReader:
    """Makes the micro-batches of any optimizer step of the run, in any order."""

    examples: Sequence[CachedExample]
    empty_caption: Path
    """Embeddings of the empty caption."""
    seed: int
    caption_dropout: float
    micro_batch: int
    """Samples of one micro-batch."""
    global_batch: int
    """Samples of one optimizer step, over all processes."""
    timesteps: int
    """Length of the base model's noise schedule; timesteps are drawn from 0 .. timesteps - 1."""
    pin: bool
    """Page-lock the batches, for a GPU."""
    rank: int = 0
    """Which of the `world_size` processes this one is; they share each optimizer step."""
    world_size: int = 1

    def __call__(self, step: OptimizerStep) -> list[Batch]:
        """This process's micro-batches of `step`: every `world_size`-th one, at least one. Each has `micro_batch` samples;
        missing ones are padded with weight 0."""
        slots = list(enumerate(step.examples))
        parts = [slots[start : start + self.micro_batch] for start in range(0, len(slots), self.micro_batch)]
        return [self._batch(step, part) for part in parts[self.rank :: self.world_size] or [[]]]

    def image_names(self, step: OptimizerStep) -> str:
        """The images of `step`, for messages."""
        return ", ".join(sorted({self.examples[index].name for index in step.examples}))

    def _batch(self, step: OptimizerStep, slots: Sequence[tuple[int, int]]) -> Batch:
        """The micro-batch of these (slot, example) pairs. Its weights are shares of the whole step over all processes."""
        weights = [1.0 / len(step.examples)] * len(slots) or [0.0]
        samples = [
            read_sample(
                self.examples[index],
                self.empty_caption,
                seed=self.seed,
                position=step.number * self.global_batch + slot,
                caption_dropout=self.caption_dropout,
                timesteps=self.timesteps,
            )
            for slot, index in slots or [(0, step.examples[0])]
        ]
        batch = make_batch(samples, weights, self.micro_batch)
        return batch.pinned() if self.pin else batch


def read_sample(
    example: CachedExample, empty_caption: Path, *, seed: int, position: int, caption_dropout: float, timesteps: int
) -> Sample:
    """The sample that `example` gives at `position` of the run, as every field of Batch but `weights`."""
    mean, log_variance = read_latents(example.latents)
    drawn = sample_randomness(seed, position, tuple(mean.shape), example.variants, caption_dropout, timesteps)
    file, variant = (empty_caption, 0) if drawn.variant is None else (example.embeddings, drawn.variant)
    hidden, pooled = read_embedding(file, variant)
    return {
        "mean": mean,
        "log_variance": log_variance,
        "latent_noise": drawn.latent_noise,
        "noise": drawn.noise,
        "offset": drawn.offset,
        "timesteps": torch.tensor(drawn.timestep),
        "hidden": hidden,
        "pooled": pooled,
        "add_time_ids": torch.tensor(example.placement.add_time_ids, dtype=torch.float32),
    }


def make_batch(samples: Sequence[Sample], weights: Sequence[float], size: int) -> Batch:
    """The batch of `size` samples that begins with `samples`; the last one is repeated with weight 0 as padding."""
    padding = size - len(samples)
    padded = [*samples, *[samples[-1]] * padding]
    stacked = {name: torch.stack([sample[name] for sample in padded]) for name in samples[0]}
    return Batch(**stacked, weights=torch.tensor([*weights, *[0.0] * padding]))


@dataclass(frozen=True)
class SampleRandomness:
    """The random numbers of one sample; tensors are fp32 on the CPU."""

    timestep: int
    """Uniform in 0 .. timesteps - 1."""
    variant: int | None
    """Which of the caption's variants; None: the empty caption."""
    offset: torch.Tensor
    """[C, 1, 1], standard normal: the direction of the noise offset."""
    latent_noise: torch.Tensor
    """[C, h, w], standard normal: samples the VAE's posterior."""
    noise: torch.Tensor
    """[C, h, w], standard normal: what is added to the latents."""


def sample_randomness(
    seed: int, position: int, latent_shape: tuple[int, int, int], variants: int, caption_dropout: float, timesteps: int
) -> SampleRandomness:
    """The random numbers of the sample at `position` (optimizer step x global batch + slot) with latents of `latent_shape`
    (C, h, w), for a noise schedule of `timesteps`."""
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, position, 0]))

    # The order of the draws is part of the result: a new one goes to the end.
    timestep = int(generator.integers(timesteps))
    is_dropped = generator.random() < caption_dropout
    variant = int(generator.integers(variants))
    shapes = ((latent_shape[0], 1, 1), latent_shape, latent_shape)
    offset, latent_noise, noise = (torch.from_numpy(generator.standard_normal(shape, dtype=np.float32)) for shape in shapes)
    return SampleRandomness(timestep, None if is_dropped else variant, offset, latent_noise, noise)
