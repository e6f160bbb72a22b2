"""Conversion of pixels from any color space to sRGB, as a color-managed viewer shows them.

Color spaces are ICC profiles. Those that a file describes in numbers (PNG's gAMA and cHRM; the code points of ITU-T H.273 in
PNG, HEIC and AVIF; the Adobe RGB of cameras) are made into one. Colors are converted by LittleCMS, relative colorimetric
with black point compensation.
"""

import io
import struct
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

MAX_PROFILE_BYTES = 1 << 24
SAME_LEVELS = 2
"""A profile that changes no level by more than this is sRGB's: its pixels are kept."""
_GAMMA_TOLERANCE = 0.05
"""libpng's: gAMA 0.45455 alone stands for sRGB, although sRGB's curve is not exactly a power."""
_MIN_GAMUT = 0.01
"""A tenth of the area of sRGB's triangle in the diagram of x and y: primaries on a line do not span a color space."""
_COLOR_SPACES = {"I;16": "GRAY", "RGB": "RGB ", "CMYK": "CMYK"}
"""Mode of the pixels -> color space of a profile that describes them."""
_NOT_PIXELS = ("link", "abst", "nmcl")
"""Device classes of profiles that describe no pixels."""

Curve = Callable[[np.ndarray], np.ndarray]
"""Encoded values, 0..1 -> light, 0..1."""
Chromaticity = tuple[float, float]

_D65, _D50_XYZ = (0.3127, 0.3290), (0.9642, 1.0, 0.8249)
_SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
_P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
_PRIMARIES = {
    1: (_SRGB, _D65),
    4: (((0.67, 0.33), (0.21, 0.71), (0.14, 0.08)), (0.310, 0.316)),
    5: (((0.64, 0.33), (0.29, 0.60), (0.15, 0.06)), _D65),
    6: (((0.630, 0.340), (0.310, 0.595), (0.155, 0.070)), _D65),
    7: (((0.630, 0.340), (0.310, 0.595), (0.155, 0.070)), _D65),
    9: (((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)), _D65),
    11: (_P3, (0.314, 0.351)),
    12: (_P3, _D65),
}
"""ColourPrimaries of ITU-T H.273, table 2: red, green and blue, and the white point."""


def _srgb_curve(values: np.ndarray) -> np.ndarray:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def _power(exponent: float) -> Curve:
    return lambda values: values**exponent


def _pq_curve(values: np.ndarray) -> np.ndarray:
    """SMPTE ST 2084, with the 203 cd/m² of ITU-R BT.2408 as white; brighter light is clipped."""
    root = values ** (1 / 78.84375)
    light = (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (1 / 0.1593017578125)
    return np.minimum(light * 10000 / 203, 1)


def _hlg_curve(values: np.ndarray) -> np.ndarray:
    """ITU-R BT.2100, with the 75 % signal of ITU-R BT.2408 as white; brighter light is clipped."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(values <= 0.5, values**2 / 3, (np.exp((values - c) / a) + b) / 12)
    return np.minimum((scene / ((np.exp((0.75 - c) / a) + b) / 12)) ** 1.2, 1)


_CURVES: dict[int, Curve] = dict.fromkeys((1, 6, 13, 14, 15), _srgb_curve)
_CURVES |= {4: _power(2.2), 5: _power(2.8), 8: _power(1.0), 16: _pq_curve, 18: _hlg_curve}
"""TransferCharacteristics of ITU-T H.273, table 3; viewers show BT.709's and its kin as sRGB's."""


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An image of mode L, I;16, RGB, CMYK or LAB as RGB in sRGB; `image` itself where there is nothing to convert.

    A profile that is damaged, or describes another kind of pixels, is ignored, like one that is sRGB's. Without a profile
    grey levels and RGB are sRGB already, and CMYK is left to Pillow; Lab never needs one. Raises ImportError where Pillow
    was built without LittleCMS.
    """
    if image.mode == "LAB":
        return ImageCms.applyTransform(image, _build_transform(ImageCms.createProfile("LAB"), "LAB"))
    if not profile or len(profile) > MAX_PROFILE_BYTES:
        return image
    if image.mode in ("L", "I;16"):
        table = _grey_table(profile)
        levels = np.asarray(image)
        return image if table is None else Image.fromarray((table if image.mode == "I;16" else table[::257])[levels])
    transform = _transform(profile, image.mode)
    return image if transform is None else ImageCms.applyTransform(image, transform)


@lru_cache(maxsize=16)
def _grey_table(profile: bytes) -> np.ndarray | None:
    """The sRGB color, uint8 [65536, 3], of every grey level; None if there is nothing to convert.

    A grey level in the color space of an RGB profile is a color of three equal values.
    """
    levels = np.arange(65536, dtype=np.uint16)
    if transform := _transform(profile, "I;16"):
        table = np.asarray(ImageCms.applyTransform(Image.fromarray(levels.reshape(256, 256)), transform)).reshape(65536, 3)
    elif transform := _transform(profile, "RGB"):
        eight_bit = np.repeat(levels[:256].astype(np.uint8), 3).reshape(16, 16, 3)
        table = np.asarray(ImageCms.applyTransform(Image.fromarray(eight_bit), transform)).reshape(256, 3)[levels // 257]
    else:
        return None
    return None if _is_close(table, np.repeat(levels // 257, 3).reshape(65536, 3)) else table


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From this profile to sRGB for images of mode I;16, RGB or CMYK; None if there is nothing to convert."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space != _COLOR_SPACES[mode] or source.profile.device_class in _NOT_PIXELS:
            return None
        transform = _build_transform(source, mode)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    if mode != "RGB":
        return transform
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    colors = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(len(levels), -1, 3)
    return None if _is_close(np.asarray(ImageCms.applyTransform(Image.fromarray(colors), transform)), colors) else transform


def _build_transform(source: object, mode: str) -> ImageCms.ImageCmsTransform:
    intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
    if mode == "I;16":
        flags |= ImageCms.Flags.NOOPTIMIZE  # the optimizer interpolates between too few dark levels
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", intent, flags)


def _is_close(converted: np.ndarray, colors: np.ndarray) -> bool:
    return bool(np.abs(converted.astype(np.int16) - colors.astype(np.int16)).max() <= SAME_LEVELS)


def profile_of_code_points(primaries: int, transfer: int, grey: bool) -> bytes | None:
    """The profile of a color space that is given by code points of ITU-T H.273; None for sRGB and unknown ones."""
    if primaries not in _PRIMARIES or transfer not in _CURVES or (primaries == 1 and _CURVES[transfer] is _srgb_curve):
        return None
    return _profile(*_PRIMARIES[primaries], _CURVES[transfer], grey)


def profile_of_gamma(gamma: float | None, chromaticities: Sequence[float] | None, grey: bool) -> bytes | None:
    """The profile of a PNG's gAMA and cHRM (white, red, green and blue: x and y each); None for sRGB and nonsense.

    One that is missing is sRGB's.
    """
    white, *primaries = list(zip(chromaticities[::2], chromaticities[1::2], strict=True)) if chromaticities else (_D65, *_SRGB)
    if gamma is not None and not 0.1 <= gamma <= 10:
        return None
    (red_x, red_y), (green_x, green_y), (blue_x, blue_y) = primaries
    area = abs((green_x - red_x) * (blue_y - red_y) - (blue_x - red_x) * (green_y - red_y)) / 2
    if area < _MIN_GAMUT or max(map(max, (white, *primaries))) > 1:
        return None
    is_srgb_gamma = gamma is None or abs(gamma * 2.2 - 1) < _GAMMA_TOLERANCE
    if is_srgb_gamma and np.allclose([white, *primaries], [_D65, *_SRGB], atol=0.005):
        return None
    return _profile(primaries, white, _srgb_curve if gamma is None else _power(1 / gamma), grey)


def adobe_rgb_profile() -> bytes:
    """What cameras mean by the interoperability index R03 of EXIF (DCF 2.0, "optional color space")."""
    return _profile(((0.64, 0.33), (0.21, 0.71), (0.15, 0.06)), _D65, _power(563 / 256), grey=False)


def _profile(primaries: Sequence[Chromaticity], white: Chromaticity, curve: Curve, grey: bool) -> bytes | None:
    """An ICC profile of version 2 (ICC.1:2001-04); None if the chromaticities are not those of a color space."""
    levels = np.rint(curve(np.linspace(0, 1, 4096)) * 65535).astype(">u2")
    tone = b"curv\0\0\0\0" + struct.pack(">I", len(levels)) + levels.tobytes()
    tags = {b"wtpt": _xyz(_D50_XYZ), b"desc": b"desc\0\0\0\0" + struct.pack(">I", 1) + bytes(79), b"cprt": b"text\0\0\0\0\0"}
    if grey:
        return _icc_file(b"GRAY", tags | {b"kTRC": tone})
    try:
        colorants = _colorants(primaries, white)
    except ZeroDivisionError:
        return None
    if not (np.isfinite(colorants).all() and np.abs(colorants).max() < 4):
        return None
    tags |= {name: _xyz(column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), colorants.T, strict=True)}
    return _icc_file(b"RGB ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), tone))


def _colorants(primaries: Sequence[Chromaticity], white: Chromaticity) -> np.ndarray:
    """XYZ of red, green and blue in columns, adapted to D50 by Bradford's matrix (ICC.1:2022, annex E)."""
    to_xyz = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    white_xyz = np.array([white[0] / white[1], 1, (1 - white[0] - white[1]) / white[1]])
    to_xyz = to_xyz * np.linalg.solve(to_xyz, white_xyz)
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    adaptation = (bradford @ _D50_XYZ) / (bradford @ white_xyz)
    return np.linalg.inv(bradford) @ (adaptation[:, None] * bradford) @ to_xyz


def _xyz(values: Sequence[float]) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(float(value) * 65536) for value in values))


def _icc_file(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """The header of a display profile, the table of tags, and the tags."""
    table, data, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    sizes = struct.pack(">I4xI4s4s4s12x4s", start + len(data), 0x02400000, b"mntr", space, b"XYZ ", b"acsp")
    return sizes + bytes(28) + _xyz(_D50_XYZ)[8:] + bytes(48) + table + data
