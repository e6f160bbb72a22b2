"""The run's order -> batches of tensors, read from the cache; noise, timesteps and caption variants are drawn from the seed.

Everything random about a sample is a pure function of (seed, position in the run); no generator state is kept. Philox is
counter-based (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): the seed is its key and the position its
counter, so the numbers of any sample can be drawn at any time, in any process and in any order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from training.data.buckets import OptimizerStep
from training.data.cache import CachedExample, read_cached_mask, read_embedding, read_latents
from training.system.process_group import ProcessGroup

Sample = dict[str, torch.Tensor]
"""One sample under the names of Batch's fields, without the batch dimension and without its weight."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B samples of one shape. Floats are fp32, except the embeddings, which have the UNet's dtype.

    A field is filled in by `BatchReader.sample` or `draw` under the same name; everything else goes through the fields by name.
    """

    mean: torch.Tensor
    """[B, C, h, w]: mean of the VAE's posterior."""
    log_variance: torch.Tensor
    """[B, C, h, w]"""
    latent_noise: torch.Tensor
    """[B, C, h, w], standard normal: samples the VAE's posterior."""
    noise: torch.Tensor
    """[B, C, h, w], standard normal: is added to the latents."""
    offset: torch.Tensor
    """[B, C, 1, 1], standard normal: direction of the noise offset."""
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
    mask: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """[B, 1, h, w]: weight of each latent in the loss of its sample; empty where no image of the run has a mask."""

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
    masks: bool = False
    """Give every sample a mask; the same for the whole run, so that steps of one shape stay one CUDA graph."""
    group: ProcessGroup = field(default_factory=ProcessGroup)
    """The processes that share each optimizer step."""

    def __call__(self, step: OptimizerStep) -> list[Batch]:
        """This process's micro-batches of `step`: every `world_size`-th one, at least one. Each has `micro_batch` samples;
        missing ones are padded with weight 0."""
        slots = list(enumerate(step.examples))
        parts = [slots[start : start + self.micro_batch] for start in range(0, len(slots), self.micro_batch)]
        return [self._batch(step, part) for part in parts[self.group.rank :: self.group.world_size] or [[]]]

    def image_names(self, step: OptimizerStep) -> str:
        """The images of `step`, for messages."""
        return ", ".join(sorted({self.examples[index].name for index in step.examples}))

    def _batch(self, step: OptimizerStep, slots: Sequence[tuple[int, int]]) -> Batch:
        """The micro-batch of these (slot, example) pairs. Its weights are shares of the whole step over all processes."""
        weights = [1.0 / len(step.examples)] * len(slots) or [0.0]
        first = step.number * self.global_batch
        samples = [self.sample(self.examples[index], first + slot) for slot, index in slots or [(0, step.examples[0])]]
        batch = make_batch(samples, weights, self.micro_batch)
        return batch.pinned() if self.pin else batch

    def sample(self, example: CachedExample, position: int) -> Sample:
        """The sample that `example` gives at `position` of the run, as every field of Batch but `weights`, and without `mask` if
        the run has none."""
        if example.mirrored and is_mirrored(self.seed, position):
            example = example.mirrored
        mean, log_variance = read_latents(example.latents)
        variant, drawn = draw(self.seed, position, tuple(mean.shape), example.variants, self.caption_dropout, self.timesteps)
        file = example.empty_caption if variant is None else example.embeddings
        hidden, pooled = read_embedding(file, variant or 0)
        if self.masks:
            mask = read_cached_mask(example.mask) if example.mask else torch.ones(1, *mean.shape[1:])
            drawn["mask"] = mask.clamp(min=example.mask_weight)
        return drawn | {
            "mean": mean,
            "log_variance": log_variance,
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


def draw(
    seed: int, position: int, latent_shape: tuple[int, int, int], variants: int, caption_dropout: float, timesteps: int
) -> tuple[int | None, Sample]:
    """Everything random about the sample at `position` (optimizer step x global batch + slot) with latents of `latent_shape`
    (C, h, w), for a noise schedule of `timesteps`: which of the caption's `variants` it has (None: the empty caption), and the
    fields of Batch that are drawn."""
    generator = _generator(seed, position, 0)

    # The order of the draws is part of the result: a new one goes to the end.
    timestep = int(generator.integers(timesteps))
    is_dropped = generator.random() < caption_dropout
    variant = int(generator.integers(variants))
    sample = {"timesteps": torch.tensor(timestep)}
    for name, shape in (("offset", (latent_shape[0], 1, 1)), ("latent_noise", latent_shape), ("noise", latent_shape)):
        sample[name] = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
    return None if is_dropped else variant, sample


def is_mirrored(seed: int, position: int) -> bool:
    """Whether the sample at `position` is the mirror image, where a run has them: half of all samples are."""
    return bool(_generator(seed, position, 1).random() < 0.5)


def _generator(seed: int, position: int, purpose: int) -> np.random.Generator:
    """The random numbers of a sample; those for one `purpose` do not depend on how many are drawn for another."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, position, purpose]))
