"""Which pictures are held out of the training. Pure."""

import math
from collections.abc import Sequence
from typing import Literal

from training.dataset import Example

AUTO_FROM = 40
"""Pictures from which "auto" holds some out: of fewer, training needs each."""
AUTO_SHARE = 0.05
AUTO_LEAST = 2


def held_out(examples: Sequence[Example], fraction: float | Literal["auto"]) -> set[int]:
    """Indices of the examples that are held out: those whose files have the lowest hashes, so that the choice depends on
    nothing but the pictures, and a picture more or less changes it by one at most."""
    names = sorted(range(len(examples)), key=lambda index: examples[index].sha256)
    return set(names[: _count(len(examples), fraction)])


def _count(pictures: int, fraction: float | Literal["auto"]) -> int:
    if fraction == "auto":
        return max(AUTO_LEAST, math.ceil(AUTO_SHARE * pictures)) if pictures >= AUTO_FROM else 0
    return min(math.ceil(fraction * pictures), pictures - 1)
