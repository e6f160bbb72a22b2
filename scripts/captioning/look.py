"""What one picture looks like, in the few numbers that tell whether it is fit for training."""

from dataclasses import dataclass
from pathlib import Path

import imagehash
import numpy as np
from PIL import Image

from dataset_folder import sniff_image_format
from pictures import BrokenPictureError, open_rgb

GREY_SIDE_PX = 512
"""Sharpness and brightness are judged at this size, whatever the picture's own."""
HASH_SIDE = 16
"""The perceptual hash has HASH_SIDE² bits. 64 bits cannot tell two expressions in front of the same background apart."""
_WINDOW_PX = 9
_TILES = 4
_FLAT = 0.5
"""A tile whose neighbouring pixels differ by less than this, of 255, is an even surface: neither sharp nor blurred."""


@dataclass(frozen=True)
class Look:
    """One decoded picture."""

    width: int
    """Pixels, after EXIF orientation."""
    height: int
    animated: bool
    blur: float
    """0 sharp .. 1 blurred, of the sharpest part: a blurred background is no fault."""
    dark: int
    """Grey level, 0..255, that one pixel of a hundred lies below."""
    bright: int
    """Grey level that one pixel of a hundred lies above."""
    hash: str
    """Perceptual hash, hexadecimal, HASH_SIDE² bits."""


def look_at(path: Path) -> Look:
    """Decode the picture at `path` and measure it. Raises BrokenPictureError if the stages cannot use it."""
    try:
        with path.open("rb") as file:
            if sniff_image_format(file.read(12)) is None:
                raise BrokenPictureError("is empty" if path.stat().st_size == 0 else "is not a PNG, JPEG, WebP or BMP picture")
    except OSError as error:
        raise BrokenPictureError(f"cannot be read: {error.strerror}") from None
    picture = open_rgb(path)
    grey = picture.convert("L")
    grey.thumbnail((GREY_SIDE_PX, GREY_SIDE_PX), Image.Resampling.BOX)
    levels = np.asarray(grey, dtype=np.float32)
    dark, bright = np.percentile(levels, (1, 99))
    return Look(
        width=picture.width,
        height=picture.height,
        animated=_is_animated(path),
        blur=round(blur(levels), 3),
        dark=int(dark),
        bright=int(bright),
        hash=str(imagehash.phash(grey, hash_size=HASH_SIDE)),
    )


def blur(levels: np.ndarray) -> float:
    """Grey `levels` float32 [height, width], 0..255 -> 0 sharp .. 1 blurred, of the sharpest of 4 x 4 tiles.

    Crété et al. 2007, "The blur effect": how much of the variation between neighbours survives a blur along that axis.
    In a sharp picture little does. The greater value of both axes counts, so motion blur is blur. 0 for an even surface.
    """
    if min(levels.shape) < 2 * _WINDOW_PX:
        return 0.0
    return max(_sharpest_tile(axis_last) for axis_last in (levels, levels.T))


def _sharpest_tile(levels: np.ndarray) -> float:
    """The same along the last axis."""
    padded = np.pad(levels, [(0, 0), (_WINDOW_PX // 2 + 1, _WINDOW_PX // 2)], mode="edge")
    sums = np.cumsum(padded, axis=1, dtype=np.float64)
    softened = (sums[:, _WINDOW_PX:] - sums[:, :-_WINDOW_PX]) / _WINDOW_PX
    steps = np.abs(np.diff(levels, axis=1))
    lost = np.maximum(steps - np.abs(np.diff(softened, axis=1)), 0)
    values = [
        1 - float(lost_in.sum() / steps_in.sum())
        for steps_in, lost_in in zip(_tiles(steps), _tiles(lost), strict=True)
        if steps_in.mean() > _FLAT
    ]
    return min(values, default=0.0)


def _tiles(values: np.ndarray) -> list[np.ndarray]:
    return [tile for rows in np.array_split(values, _TILES) for tile in np.array_split(rows, _TILES, axis=1)]


def _is_animated(path: Path) -> bool:
    with Image.open(path) as image:
        return getattr(image, "is_animated", False)
