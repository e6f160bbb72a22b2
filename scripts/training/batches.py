"""The run's order -> batches of tensors, read from the caches and drawn from the seed. A pure function of both."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from training.buckets import OptimizerStep, Placement
from training.cache import read_embedding, read_latents
from training.draws import Draw, draw


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
class CachedExample:
    """Where the parts of an example lie."""

    name: str
    placement: Placement
    latents: Path
    captions: Path
    variants: int
    """How many variants `captions` holds."""


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
        """The pictures of `step`, for messages."""
        return ", ".join(sorted({self.examples[index].name for index in step.examples}))

    def _sample(self, index: int, position: int) -> tuple[torch.Tensor, ...]:
        example = self.examples[index]

        def drawn(shape: tuple[int, int, int]) -> Draw:
            return draw(self.seed, position, shape, example.variants, self.caption_dropout)

        return read_sample(example, drawn, self.empty_caption)


def read_sample(
    example: CachedExample, drawn_for: Callable[[tuple[int, int, int]], Draw], empty_caption: Path
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
