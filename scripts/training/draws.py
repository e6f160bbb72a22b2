"""(seed, position in the run) -> everything random about one sample. No generator state is carried anywhere.

Philox is counter-based (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): the seed is its key and the
position its counter, so any sample's numbers can be drawn at any time, in any process, in any order.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class Draw:
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


def draw(seed: int, position: int, latent_shape: tuple[int, int, int], variants: int, caption_dropout: float) -> Draw:
    """The draw of the sample at `position` (optimizer step x global batch + slot) with latents of `latent_shape` (C, h, w)."""
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, position, 0]))
    timestep = int(generator.integers(TRAIN_TIMESTEPS))
    dropped = generator.random() < caption_dropout
    variant = int(generator.integers(variants))
    return Draw(
        timestep=timestep,
        variant=None if dropped else variant,
        offset=_normal(generator, (latent_shape[0], 1, 1)),
        latent_noise=_normal(generator, latent_shape),
        noise=_normal(generator, latent_shape),
    )


def uniform(seed: int, name: str, shape: tuple[int, ...], bound: float) -> torch.Tensor:
    """fp32 tensor of `shape`, uniform in -bound .. bound, determined by `seed` and `name` alone."""
    counter = np.frombuffer(hashlib.sha256(name.encode()).digest(), dtype="<u8")
    generator = np.random.Generator(np.random.Philox(key=seed, counter=counter))
    return torch.from_numpy(generator.random(shape, dtype=np.float32) * (2 * bound) - bound)


def _normal(generator: np.random.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
