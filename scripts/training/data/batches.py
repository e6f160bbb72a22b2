"""The run's order -> batches of tensors, read from the cache; noise, timesteps and caption variants are drawn from the seed.

Everything random about a sample is a pure function of (seed, position in the run); no generator state is kept. Philox is
counter-based (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): the seed is its key and the position its
counter, so the numbers of any sample can be drawn at any time, in any process and in any order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from training.data.buckets import OptimizerStep
from training.data.cache_files import CachedExample, read_cached_mask, read_latents, read_text
from training.system.process_group import ProcessGroup

PRIOR_EVERY = 5
"""Every so many samples, the base model is asked as well: for all of them it would cost more than as much time again."""
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
    add_time_ids: torch.Tensor
    """[B, 6]"""
    weights: torch.Tensor
    """[B]: share of each sample in the loss of the optimizer step; 0 for padding."""
    hidden: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """[B, tokens, D]: hidden states of both text encoders; empty if captions are encoded in the step."""
    pooled: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """[B, P]: pooled embedding of the second encoder, or empty."""
    tokens: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """[B, 2, chunks, 77], int64: captions that are encoded in the step; empty if they are encoded already."""
    mask: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """[B, 1, h, w]: weight of each latent in the loss of its sample; empty where no image of the run has a mask."""
    prior_rows: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """[N], int64: samples whose prediction for another caption is to remain that of the base model; N may be 0."""
    prior_hidden: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """[N, tokens, D]: that caption, as `hidden`."""
    prior_pooled: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """[N, P]"""
    prior_tokens: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """[N, 2, chunks, 77]"""
    prior_weights: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """[N]: share of each of these in the loss of the optimizer step."""

    @property
    def text(self) -> tuple[torch.Tensor, ...]:
        """The captions: hidden states and pooled embeddings, or tokens."""
        return (self.tokens,) if self.tokens.numel() else (self.hidden, self.pooled)

    @property
    def prior_text(self) -> tuple[torch.Tensor, ...]:
        return (self.prior_tokens,) if self.prior_tokens.numel() else (self.prior_hidden, self.prior_pooled)

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
    timestep_at: Callable[[float], int] | None = None
    """The timestep at a quantile, 0 .. 1, of their distribution; None: all are equally likely."""
    prior_preservation: float = 0.0
    """Weight of the loss that keeps what the base model predicts for the class of the subject; 0: none."""
    group: ProcessGroup = field(default_factory=ProcessGroup)
    """The processes that share each optimizer step."""
    regularization: Sequence[CachedExample] = ()
    prior_weight: float = 1.0
    """Of the mean loss of a step's regularization images, beside 1 of that of its examples (Ruiz et al. 2022, arXiv 2208.12242,
    equation 2)."""

    def __call__(self, step: OptimizerStep) -> list[Batch]:
        """This process's micro-batches of `step`, those of regularization images last: every `world_size`-th one, at least one.
        Each has `micro_batch` samples; missing ones are padded with weight 0."""
        return [self._batch(step, *part) for part in self._parts_of_process(step) or [([], False)]]

    def indices(self, step: OptimizerStep) -> list[int]:
        """The examples of this process's samples of `step`, in the order of its micro-batches; regularization images, which come
        after them, are left out."""
        return [index for slots, is_prior in self._parts_of_process(step) if not is_prior for _, index in slots]

    def image_names(self, step: OptimizerStep) -> str:
        """The images of `step`, for messages."""
        names = {self.examples[index].name for index in step.examples}
        return ", ".join(sorted(names | {self.regularization[index].name for index in step.regularization}))

    def _parts_of_process(self, step: OptimizerStep) -> list[tuple[list[tuple[int, int]], bool]]:
        """The (slot, index) pairs of each micro-batch, and whether they are regularization images."""
        parts = []
        for indices, is_prior in ((step.examples, False), (step.regularization, True)):
            slots = list(enumerate(indices))
            parts += [(slots[start : start + self.micro_batch], is_prior) for start in range(0, len(slots), self.micro_batch)]
        return parts[self.group.rank :: self.group.world_size]

    def _batch(self, step: OptimizerStep, slots: Sequence[tuple[int, int]], is_prior: bool) -> Batch:
        """The micro-batch of these (slot, index) pairs. Its weights are shares of the whole step over all processes."""
        examples, weight = (self.regularization, self.prior_weight) if is_prior else (self.examples, 1.0)
        weights = [weight / len(step.examples)] * len(slots) or [0.0]
        first = step.number * self.global_batch
        used = slots or [(0, step.examples[0])]
        samples = [self.sample(examples[index], first + slot, is_prior=is_prior) for slot, index in used]
        batch = make_batch(samples, weights, self.micro_batch)
        if self.prior_preservation:
            batch = replace(batch, **self._prior(step, [] if is_prior else slots))
        return batch.pinned() if self.pin else batch

    def sample(self, example: CachedExample, position: int, *, is_prior: bool = False) -> Sample:
        """The sample that `example` gives at `position` of the run, as every field of Batch but `weights`, and without `mask` if
        the run has none."""
        if example.mirrored and is_mirrored(self.seed, position, is_prior=is_prior):
            example = example.mirrored
        mean, log_variance = read_latents(example.latents)
        how = example.variants, self.caption_dropout, self.timesteps, self.timestep_at
        variant, drawn = draw(self.seed, position, tuple(mean.shape), *how, is_prior=is_prior)
        if self.masks:
            mask = read_cached_mask(example.mask) if example.mask else torch.ones(1, *mean.shape[1:])
            drawn["mask"] = mask.clamp(min=example.mask_weight)
        return drawn | {
            "mean": mean,
            "log_variance": log_variance,
            "add_time_ids": torch.tensor(example.placement.add_time_ids, dtype=torch.float32),
            **self._text(example, variant, example.text),
        }

    def _text(self, example: CachedExample, variant: int | None, file: Path) -> Sample:
        """A variant in the file of a caption of `example`; of None, the empty caption."""
        return read_text(example.empty_caption if variant is None else file, variant or 0)

    def _prior(self, step: OptimizerStep, slots: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """The fields of Batch for what is to remain of the base model, for every PRIOR_EVERY-th sample of the run. They count so
        much more, so that its weight does not depend on how many there are in a step; but not where no trigger word is replaced:
        the LoRA would be asked to change nothing for the very caption that it learns."""
        rows, texts, weights = [], [], []
        weight = self.prior_preservation * PRIOR_EVERY / self.global_batch
        for row, (slot, index) in enumerate(slots):
            position = step.number * self.global_batch + slot
            if position % PRIOR_EVERY == 0:
                example = self.examples[index]
                variant, _ = draw(self.seed, position, (1, 1, 1), example.variants, self.caption_dropout, self.timesteps)
                rows.append(row)
                weights.append(weight if variant in example.class_variants else 0.0)
                texts.append(self._text(example, variant, example.class_text))
        fields = {"prior_rows": torch.tensor(rows, dtype=torch.int64), "prior_weights": torch.tensor(weights)}
        names = texts[0] if texts else ()
        return fields | {f"prior_{name}": torch.stack([text[name] for text in texts]) for name in names}


def make_batch(samples: Sequence[Sample], weights: Sequence[float], size: int) -> Batch:
    """The batch of `size` samples that begins with `samples`; the last one is repeated with weight 0 as padding."""
    padding = size - len(samples)
    padded = [*samples, *[samples[-1]] * padding]
    stacked = {name: torch.stack([sample[name] for sample in padded]) for name in samples[0]}
    return Batch(**stacked, weights=torch.tensor([*weights, *[0.0] * padding]))


def draw(
    seed: int,
    position: int,
    latent_shape: tuple[int, int, int],
    variants: int,
    caption_dropout: float,
    timesteps: int,
    timestep_at: Callable[[float], int] | None = None,
    *,
    is_prior: bool = False,
) -> tuple[int | None, Sample]:
    """Everything random about the sample at `position` (optimizer step x global batch + slot) with latents of `latent_shape`
    (C, h, w), for a noise schedule of `timesteps`, drawn as in BatchReader: which of the caption's `variants` it has (None: the
    empty caption), and the fields of Batch that are drawn. The regularization image at the same position (`is_prior`) has numbers
    of its own."""
    generator = _generator(seed, position, 2 * is_prior)

    # The order of the draws is part of the result: a new one goes to the end.
    timestep = int(generator.integers(timesteps))
    is_dropped = generator.random() < caption_dropout
    variant = int(generator.integers(variants))
    sample = {"timesteps": torch.tensor(timestep)}
    for name, shape in (("offset", (latent_shape[0], 1, 1)), ("latent_noise", latent_shape), ("noise", latent_shape)):
        sample[name] = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
    if timestep_at:
        sample["timesteps"] = torch.tensor(timestep_at(generator.random()))
    return None if is_dropped else variant, sample


def is_mirrored(seed: int, position: int, *, is_prior: bool = False) -> bool:
    """Whether the sample at `position`, or the regularization image there (`is_prior`), is the mirror image, where a run has them:
    half of all samples are."""
    return bool(_generator(seed, position, 1 + 2 * is_prior).random() < 0.5)


def _generator(seed: int, position: int, purpose: int) -> np.random.Generator:
    """The random numbers of a sample; those for one `purpose` do not depend on how many are drawn for another."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, position, purpose]))
