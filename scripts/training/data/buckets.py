"""Sizes -> buckets, crops and time ids; a seed -> the run's order of batches. Pure functions of their arguments."""

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Bucket:
    """One shape of training images, in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class Placement:
    """How an image gets into its bucket: scaled to cover it, then cropped to the centre. All in pixels."""

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


def place(width: int, height: int, resolution: int, step: int, max_side: int) -> Placement:
    """Choose the bucket of a `width` x `height` image and its crop there; nothing is ever scaled up.

    A large image takes, among the full-area buckets it covers, the one nearest to its aspect ratio. An image that
    covers none of them keeps its size, rounded down to multiples of `step`.
    """
    aspect = math.log(width / height)
    full = _full_area_buckets(resolution, step, max_side)
    covered = [bucket for bucket in full if bucket.width <= width and bucket.height <= height]
    own = Bucket(_rounded_down(width, step, max_side), _rounded_down(height, step, max_side))
    if own.width * own.height <= resolution**2:
        covered.append(own)
    bucket = min(covered, key=lambda b: (abs(math.log(b.width / b.height) - aspect), -b.width * b.height))
    scale = max(bucket.width / width, bucket.height / height)
    resized_width, resized_height = max(bucket.width, round(width * scale)), max(bucket.height, round(height * scale))
    left, top = (resized_width - bucket.width) // 2, (resized_height - bucket.height) // 2
    return Placement(width, height, resized_width, resized_height, left, top, bucket)


def _full_area_buckets(resolution: int, step: int, max_side: int) -> list[Bucket]:
    """For every length of one side the largest other side so that the area stays within `resolution` squared. A shape
    lying on its side is a bucket as well."""
    sides = [(side, min(resolution**2 // side // step * step, max_side)) for side in range(step, max_side + 1, step)]
    return sorted({Bucket(*shape) for side, other in sides if other >= step for shape in ((side, other), (other, side))})


def _rounded_down(side: int, step: int, max_side: int) -> int:
    return max(step, min(side, max_side) // step * step)


@dataclass(frozen=True)
class OptimizerStep:
    """What one update of the weights sees."""

    number: int
    """Counts from 0 over the whole run."""
    epoch: int
    """Counts from 0; the epoch in which its last image's turn came."""
    bucket: Bucket
    examples: tuple[int, ...]
    """Indices of the examples; fewer than the global batch only in the last step of a bucket."""


def run_order(buckets: Sequence[Bucket], repeats: Sequence[int], epochs: int, global_batch: int, seed: int) -> list[OptimizerStep]:
    """The whole run: example i is of shape `buckets[i]` and is shown `repeats[i]` times per epoch.

    Each bucket's images form one stream over all epochs, shuffled anew in each; the stream is cut into global batches,
    so leftovers of an epoch wait for the next one and only a bucket's very last batch can be short. Within an epoch the
    batches of all buckets are shuffled together. The short ones end the run, so that a run of more epochs begins with
    the same full ones.
    """
    members = defaultdict(list)
    for index, bucket in enumerate(buckets):
        members[bucket] += [index] * repeats[index]
    by_epoch, short = defaultdict(list), []
    for bucket, indices in sorted(members.items()):
        stream = [(epoch, index) for epoch in range(epochs) for index in _shuffled(indices, seed, "pictures", bucket, epoch)]
        for start in range(0, len(stream), global_batch):
            batch = stream[start : start + global_batch]
            step = (bucket, tuple(index for _, index in batch))
            (by_epoch[batch[-1][0]] if len(batch) == global_batch else short).append(step)
    full = [(epoch, *step) for epoch in sorted(by_epoch) for step in _shuffled(by_epoch[epoch], seed, "batches", epoch)]
    leftovers = [(epochs - 1, *step) for step in _shuffled(short, seed, "leftovers")]
    return [OptimizerStep(number, *step) for number, step in enumerate(full + leftovers)]


def _shuffled(items: list, *key: object) -> list:
    """`items` in an order that depends on `key` alone, the same on every machine and version."""
    order = sorted(range(len(items)), key=lambda place: hashlib.sha256(repr((*key, place)).encode()).digest())
    return [items[place] for place in order]
