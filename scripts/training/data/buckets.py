"""Image sizes -> buckets, crops and time ids; a seed -> the order of the run's batches. Pure functions."""

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, order=True)
class Bucket:
    """One shape of training images, in pixels. Its repr is part of the keys in the cache."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class Placement:
    """How an image is fitted into its bucket: scaled to cover it, then cropped to the centre. All in pixels.

    Its repr is part of the keys in the cache.
    """

    original_width: int
    original_height: int
    resized_width: int
    resized_height: int
    left: int
    top: int
    bucket: Bucket

    @property
    def add_time_ids(self) -> tuple[int, int, int, int, int, int]:
        """SDXL's size conditioning (Podell et al. 2023, arXiv 2307.01952, section 2.2), every pair height first:
        original size, crop (top, left) in the resized image, target size."""
        return (self.original_height, self.original_width, self.top, self.left, self.bucket.height, self.bucket.width)


def assign_bucket(width: int, height: int, resolution: int, step: int, max_side: int) -> Placement:
    """Choose the bucket of a `width` x `height` image and its crop; images are never scaled up.

    A large image gets, among the full-area buckets that it covers, the one nearest to its aspect ratio. An image that
    covers none of them keeps its size, rounded down to multiples of `step`.
    """
    aspect = math.log(width / height)
    full_area = _full_area_buckets(resolution, step, max_side)
    candidates = [bucket for bucket in full_area if bucket.width <= width and bucket.height <= height]
    own_size = Bucket(*(max(step, min(side, max_side) // step * step) for side in (width, height)))
    if own_size.width * own_size.height <= resolution**2:
        candidates.append(own_size)
    bucket = min(candidates, key=lambda b: (abs(math.log(b.width / b.height) - aspect), -b.width * b.height))
    scale = max(bucket.width / width, bucket.height / height)
    resized_width, resized_height = max(bucket.width, round(width * scale)), max(bucket.height, round(height * scale))
    left, top = (resized_width - bucket.width) // 2, (resized_height - bucket.height) // 2
    return Placement(width, height, resized_width, resized_height, left, top, bucket)


def _full_area_buckets(resolution: int, step: int, max_side: int) -> list[Bucket]:
    """For every length of one side, the largest other side for which the area is at most `resolution` squared; each shape
    also turned by 90 degrees."""
    sides = [(side, min(resolution**2 // side // step * step, max_side)) for side in range(step, max_side + 1, step)]
    return sorted({Bucket(*shape) for side, other in sides if other >= step for shape in ((side, other), (other, side))})


@dataclass(frozen=True)
class OptimizerStep:
    """The samples of one update of the weights."""

    number: int
    """Counts from 0 over the whole run."""
    epoch: int
    """Counts from 0; the epoch of its last sample."""
    bucket: Bucket
    examples: tuple[int, ...]
    """Indices of the examples; fewer than the global batch only in the last step of a bucket."""
    regularization: tuple[int, ...] = ()
    """Indices of as many regularization images, of one bucket of their own; empty without them."""


def run_order(
    buckets: Sequence[Bucket], repeats: Sequence[int], epochs: int, global_batch: int, seed: int | str
) -> list[OptimizerStep]:
    """The order of the whole run, in which example i has the shape `buckets[i]` and is seen `repeats[i]` times per epoch.

    The images of each bucket form one stream over all epochs, shuffled again for each epoch. The stream is cut into global
    batches: what an epoch leaves over is completed by the next one, and only the very last batch of a bucket can be short.
    Within an epoch the batches of all buckets are shuffled together. The short ones come last, so that a run with more epochs
    begins with the same full ones.
    """
    members = defaultdict(list)
    for index, bucket in enumerate(buckets):
        members[bucket] += [index] * repeats[index]
    by_epoch, short = defaultdict(list), []
    for bucket, indices in sorted(members.items()):
        # The words in the keys of `_shuffled` are part of the order, and so of every checkpoint: never change them.
        stream = [(epoch, index) for epoch in range(epochs) for index in _shuffled(indices, seed, "pictures", bucket, epoch)]
        for start in range(0, len(stream), global_batch):
            batch = stream[start : start + global_batch]
            step = (bucket, tuple(index for _, index in batch))
            (by_epoch[batch[-1][0]] if len(batch) == global_batch else short).append(step)
    full = [(epoch, *step) for epoch in sorted(by_epoch) for step in _shuffled(by_epoch[epoch], seed, "batches", epoch)]
    leftovers = [(epochs - 1, *step) for step in _shuffled(short, seed, "leftovers")]
    return [OptimizerStep(number, *step) for number, step in enumerate(full + leftovers)]


def epochs_of(buckets: Sequence[Bucket], repeats: Sequence[int], steps: int, global_batch: int) -> int:
    """The fewest epochs whose order has `steps` full batches: it begins with those of every longer run."""
    members: dict[Bucket, int] = defaultdict(int)
    for bucket, count in zip(buckets, repeats, strict=True):
        members[bucket] += count
    epochs = max(1, steps * global_batch // sum(members.values()))  # at least; each bucket may hold back a part of a batch
    while sum(epochs * count // global_batch for count in members.values()) < steps:
        epochs += 1
    return epochs


def add_regularization(
    order: Sequence[OptimizerStep], buckets: Sequence[Bucket], repeats: Sequence[int], global_batch: int, seed: int
) -> list[OptimizerStep]:
    """The same steps, each with one regularization image for each of its examples. Image i has the shape `buckets[i]`.

    They come from an order of their own, which begins again when all were seen `repeats[i]` times; a run with more steps begins
    with the same ones.
    """
    samples = (len(order) + len(set(buckets))) * global_batch  # enough, even if a batch of each bucket is left incomplete
    drawn = run_order(buckets, repeats, math.ceil(samples / sum(repeats)), global_batch, f"{seed} regularization")
    return [replace(step, regularization=drawn[step.number].examples[: len(step.examples)]) for step in order]


def _shuffled(items: list, *key: object) -> list:
    """`items` in an order that depends on `key` alone, the same on every machine and version."""
    order = sorted(range(len(items)), key=lambda position: hashlib.sha256(repr((*key, position)).encode()).digest())
    return [items[position] for position in order]
