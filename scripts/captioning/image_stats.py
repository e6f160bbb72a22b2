"""Measure one image: size, sharpness, brightness, tint, edges and a perceptual hash, from which the audit finds flaws."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from common.images import read_image
from common.thumbnails import Thumbnails

GREY_SIDE_PX = 512
"""Images are scaled down to this before they are measured, so that the limits of the audit hold for any size."""
HASH_SIDE = 16
"""The perceptual hash has HASH_SIDE² bits. 64 bits do not distinguish two expressions in front of the same background."""
_WINDOW_PX = 9
_TILES = 4
_COLOR_SIDE_PX = 32
_EDGE_CELLS = 8
"""The edges of an image are compared in cells of 1/8 of its width and height: the top row and, down to 3/4, both sides."""
_XYZ_OF_RGB = np.array([[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]])
_WHITE_XYZ = _XYZ_OF_RGB.sum(axis=1)
_EVEN = 0.5
"""A tile whose neighbouring pixels differ by less than this on average, of 255, is an even surface: neither sharp nor blurred."""


@dataclass(frozen=True)
class ImageStats:
    """Measurements of one decoded image."""

    width: int
    """Pixels, after EXIF orientation."""
    height: int
    animated: bool
    blur: float
    """0 sharp .. 1 blurred, of the sharpest part: a blurred background is not a flaw."""
    dark: int
    """Grey level, 0..255, that 1 % of the pixels are darker than."""
    bright: int
    """Grey level, 0..255, that 1 % of the pixels are brighter than."""
    hash: str
    """Perceptual hash, hexadecimal, HASH_SIDE² bits."""
    tint: tuple[float, float]
    """Color of the light, as a* and b* of CIELAB: (0, 0) is neutral, (0, 12) a clearly yellow light. See `measure_tint`."""
    edges: str
    """Mean RGB of the cells along the edges, hexadecimal, 3 bytes each."""
    revision: str = ""
    """See `DecodedImage.revision`."""


def measure(path: Path, thumbnails: Thumbnails | None = None) -> ImageStats:
    """Decode and measure the image at `path`, and add it to `thumbnails`. Raises BrokenImageError if it cannot be used."""
    decoded = read_image(path)
    if thumbnails:
        thumbnails.add(path, decoded.rgb)
    image = decoded.rgb
    grey = image.convert("L")
    grey.thumbnail((GREY_SIDE_PX, GREY_SIDE_PX), Image.Resampling.BOX)
    counts = np.cumsum(grey.histogram())
    dark, bright = (percentile(counts, share) for share in (0.01, 0.99))
    size = (_COLOR_SIDE_PX, _COLOR_SIDE_PX)
    colors = np.asarray(image.resize(size, Image.Resampling.BOX, reducing_gap=2.0), dtype=np.float32)
    return ImageStats(
        width=image.width,
        height=image.height,
        animated=decoded.is_animated,
        blur=round(measure_blur(np.asarray(grey)), 3),
        dark=int(dark),
        bright=int(bright),
        hash=perceptual_hash(grey),
        tint=measure_tint(colors),
        edges=edge_cells(colors).tobytes().hex(),
        revision=decoded.revision,
    )


def percentile(counts: np.ndarray, share: float) -> float:
    """The grey level below which this share of the pixels is, interpolated as numpy's percentile; `counts` [256]: how many pixels
    have at most each level."""
    position = share * (counts[-1] - 1)
    below, above = np.searchsorted(counts, (int(position), math.ceil(position)), side="right")
    return float(below + (position - int(position)) * (above - below))


def measure_tint(colors: np.ndarray) -> tuple[float, float]:
    """`colors` float32 [side, side, 3], 0..255 -> (a*, b*) of the light by the grey-edge hypothesis with Minkowski norm 6.

    Van de Weijer et al. 2007, "Edge-Based Color Constancy": the differences between neighbours are grey on average, whatever
    the colors of the surfaces are. The mean color or the brightest pixels say more about the subject than about the light.
    """
    linear = (colors / 255) ** 2.2
    steps = np.abs(np.diff(linear, axis=0))[:, :-1] + np.abs(np.diff(linear, axis=1))[:-1]
    light = (steps.reshape(-1, 3).astype(np.float64) ** 6).mean(axis=0) ** (1 / 6) + 1e-4  # neutral where nothing differs
    x, y, z = np.cbrt(_XYZ_OF_RGB @ (0.4 * light / light.mean()) / _WHITE_XYZ)
    return round(float(500 * (x - y)), 1), round(float(200 * (y - z)), 1)


def edge_cells(colors: np.ndarray) -> np.ndarray:
    """`colors` [side, side, 3] -> uint8 [cells, 3]: the mean of each cell along the top and the sides, where the person is not."""
    cell = len(colors) // _EDGE_CELLS
    cells = colors.reshape(_EDGE_CELLS, cell, _EDGE_CELLS, cell, 3).mean(axis=(1, 3))
    sides = slice(1, _EDGE_CELLS * 3 // 4)
    return np.concatenate([cells[0], cells[sides, 0], cells[sides, -1]]).astype(np.uint8)


def measure_blur(levels: np.ndarray) -> float:
    """Grey `levels` uint8 [height, width] -> 0 sharp .. 1 blurred, of the sharpest of 4 x 4 tiles.

    Crété et al. 2007, "The blur effect": the share of the variation between neighbours that is lost when the image is
    blurred along that axis; a blurred image loses little. The greater value of both axes counts, so that motion blur is
    blur. 0 for an even surface.
    """
    if min(levels.shape) < 2 * _WINDOW_PX:
        return 0.0
    return max(_blur_along(levels.astype(np.int16), axis) for axis in (0, 1))


def _blur_along(levels: np.ndarray, axis: int) -> float:
    """`levels` int16. All numbers but the last are whole, and _WINDOW_PX times as large: a box filter is a sum."""
    half = _WINDOW_PX // 2
    padded = np.pad(levels, [(half, half) if each == axis else (0, 0) for each in (0, 1)], mode="edge")
    length = levels.shape[axis]

    def part(start: int) -> np.ndarray:
        return padded[start : start + length] if axis == 0 else padded[:, start : start + length]

    softened = part(0) + part(1)
    for start in range(2, _WINDOW_PX):
        softened += part(start)
    steps, lost = np.diff(levels, axis=axis), np.diff(softened, axis=axis)
    for differences in (steps, lost):  # in place: an array of this size is new memory each time
        np.abs(differences, out=differences)
    steps *= _WINDOW_PX
    np.subtract(steps, lost, out=lost)
    np.maximum(lost, 0, out=lost)
    values = []
    for steps_in_rows, lost_in_rows in zip(np.array_split(steps, _TILES), np.array_split(lost, _TILES), strict=True):
        # All rows are first added up to one, for which 32 bits are enough: there are at most GREY_SIDE_PX.
        columns = (np.array_split(rows.sum(axis=0, dtype=np.int32), _TILES) for rows in (steps_in_rows, lost_in_rows))
        for steps_in, lost_in in zip(*columns, strict=True):
            if steps_in.sum() > _WINDOW_PX * _EVEN * len(steps_in_rows) * len(steps_in):
                values.append(1 - lost_in.sum() / steps_in.sum())
    return float(min(values, default=0.0))


def perceptual_hash(grey: Image.Image) -> str:
    """HASH_SIDE² bits, hexadecimal: which of the lowest frequencies of the image are stronger than their median.

    The bits are those of ImageHash's `phash`: a Lanczos resize to a square of 4 x HASH_SIDE pixels, then a DCT of type II
    without normalisation along both axes. http://www.hackerfactor.com/blog/index.php?/archives/432-Looks-Like-It.html
    """
    side = 4 * HASH_SIDE
    levels = np.asarray(grey.resize((side, side), Image.Resampling.LANCZOS), dtype=np.float64)
    low = _dct(_dct(levels, axis=0), axis=1)[:HASH_SIDE, :HASH_SIDE]
    return np.packbits(low > np.median(low)).tobytes().hex()


def _dct(values: np.ndarray, axis: int) -> np.ndarray:
    """The discrete cosine transform of type II along `axis`: the FFT of the values followed by their mirror image.

    A product with a matrix of cosines is less exact: where coefficients are 0, as in even surfaces, it leaves rounding errors,
    on which the bits of the hash would depend.
    """
    values = np.moveaxis(values, axis, -1)
    count = values.shape[-1]
    spectrum = np.fft.rfft(np.concatenate([values, values[..., ::-1]], axis=-1))[..., :count]
    return np.moveaxis((spectrum * np.exp(-0.5j * np.pi * np.arange(count) / count)).real, -1, axis)
