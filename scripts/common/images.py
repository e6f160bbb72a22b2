"""Decoding and verifying images: one decoder for every stage, with one set of formats, limits and error messages.

Pixels are what a color-managed viewer shows: upright, in sRGB, on white. docs/images.md describes this for users.
"""

import io
import logging
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    ExifTags,
    Image,
    ImageChops,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from common.color import adobe_rgb_profile, profile_of_code_points, profile_of_gamma, to_srgb
from common.files import read_file
from common.image_formats import FORMAT_NAMES, HEAD_BYTES, describe_other_content, sniff_image_format
from common.png_chunks import MAX_METADATA_BYTES, png_chunks, without_unread_chunks

MAX_PIXELS = 89_478_485
"""Pillow's own limit; a decoded image has 4 bytes per pixel."""
MAX_SIDE_PX = 16384
"""Of the longer side: taggers pad an image to a square, whose memory grows with the square of that side."""
MAX_JPEG_PIXELS = MAX_SIDE_PX**2
"""Larger than the 200 megapixels of phones. A JPEG beyond the other two limits is decoded at 1/2, 1/4 or 1/8 of its size."""
MAX_FILE_BYTES = 1 << 29

DECODER_REVISION = "2"
"""To be raised when other images get other pixels: what was computed from their former pixels is then computed again."""

_LARGE_PIXELS = 1 << 25
_ONE_LARGE_IMAGE = threading.Lock()
"""Held while an image of more than _LARGE_PIXELS is decoded, which takes several copies of it, so that threads do not add up."""

_READERS: dict[str, type[ImageFile.ImageFile]] = {
    "png": PngImagePlugin.PngImageFile,
    "jpeg": JpegImagePlugin.JpegImageFile,  # reads the first image of an MPO file and ignores the others
    "webp": WebPImagePlugin.WebPImageFile,
    "bmp": BmpImagePlugin.BmpImageFile,
    "tiff": TiffImagePlugin.TiffImageFile,
    "avif": AvifImagePlugin.AvifImageFile,
}
_REDUCIBLE = ("L", "RGB", "RGBA", "CMYK")
_HEIC_SEQUENCES = (b"msf1", b"hevc", b"hevx", b"hevm", b"hevs")
_PNG_GREY_FACTORS = {"L;2": 85, "L;4": 17}
_PHOTOMETRIC, _INTEROPERABILITY_INDEX = 262, 1
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
DECODER_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, AttributeError, LookupError, EOFError, ArithmeticError, AssertionError),
    *(RuntimeError, struct.error, zlib.error, Warning),
)
"""What the readers raise for damaged files. Warnings are errors in tests only."""

PngImagePlugin.MAX_TEXT_CHUNK = MAX_METADATA_BYTES
# About metadata that is not read; damaged pixels are errors.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())


class BrokenImageError(ValueError):
    """The image cannot be used. The message is a predicate that says why, such as "is empty"."""


@dataclass(frozen=True)
class DecodedImage:
    """An image file, decoded completely."""

    rgb: Image.Image
    """8-bit RGB in sRGB, upright, transparent areas white. Its size is that of the image for all stages."""
    format: str
    """A key of IMAGE_FORMATS."""
    is_animated: bool
    """Whether `rgb` is only the first of several frames."""
    revision: str
    """DECODER_REVISION if version 1.0 decoded the file to other pixels, else empty: part of the keys of what is computed from
    the pixels, so that only the values of such images are computed again."""
    alpha: Image.Image | None
    """How opaque `rgb` was before it was put on white, 8-bit grey of the same size; None if it is opaque everywhere."""


def open_rgb(path: Path) -> Image.Image:
    """The pixels of the image at `path`; see `read_image`."""
    return read_image(path).rgb


def read_image(path: Path, *, scales_down: bool = False, least_px: int = 0) -> DecodedImage:
    """Read and decode the image at `path`. Raises BrokenImageError if it cannot be read; see `decode`."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise BrokenImageError(f"is larger than {MAX_FILE_BYTES >> 20} MiB")
        return decode(read_file(path), scales_down=scales_down, least_px=least_px)
    except OSError as error:
        raise BrokenImageError(f"cannot be read: {error.strerror}") from None


def read_mask(path: Path, image: Path) -> DecodedImage:
    """The mask of an `image`, decoded, with an `alpha` that is white where the image counts: the grey levels of the file `path`,
    whose transparent areas are black; of the image itself, its transparency. A mask may have the size of a photograph that is
    scaled down. Raises BrokenImageError, as `read_image` does."""
    decoded = read_image(path, scales_down=path != image)
    if path == image:
        return decoded
    grey = decoded.rgb.convert("L")  # on white
    return replace(decoded, alpha=grey if decoded.alpha is None else ImageChops.add(grey, decoded.alpha, offset=-255))


def decode(content: bytes, *, scales_down: bool = False, least_px: int = 0) -> DecodedImage:
    """Decode the image file `content`; `scales_down`: any that has the size of a JPEG which is scaled down, as that is; `least_px`:
    to a fraction of its size, where a longest side of so many pixels and half of it is enough.

    Of an animation and of a file of several images the first one is taken. Raises BrokenImageError for a file that is not an
    image of one of IMAGE_FORMATS, is damaged, or exceeds the limits above, before memory for its pixels is taken.
    """
    image_format = _format_of(content)
    with _as_broken_image(), _open(content, image_format) as image:
        size = image.width * image.height
        factor = _limit_size(image, image_format, scales_down=scales_down, least_px=least_px)
        with _ONE_LARGE_IMAGE if size > _LARGE_PIXELS else nullcontext():
            rgb, alpha, is_revised = _to_rgb(image, image_format, content, factor)
            method = _TRANSPOSITIONS.get(_exif_value(image, ExifTags.Base.Orientation))
            if method is not None:
                rgb, alpha = rgb.transpose(method), alpha and alpha.transpose(method)
        if image_format == "heic":
            is_animated = content[8:12] in _HEIC_SEQUENCES
        else:
            is_animated = image_format != "tiff" and getattr(image, "is_animated", False)
        return DecodedImage(rgb, image_format, is_animated, DECODER_REVISION if is_revised else "", alpha)


def verify_download(content: bytes) -> DecodedImage:
    """Decode the downloaded image file `content`. Raises BrokenImageError unless it is a complete and undamaged still image."""
    if _format_of(content) == "png":
        chunks = list(png_chunks(content))
        if not chunks or chunks[-1].name != b"IEND" or chunks[-1].end > len(content):
            raise BrokenImageError("is cut off")
        if damaged := [chunk for chunk in chunks if not chunk.is_intact(content)]:
            raise BrokenImageError(f"cannot be decoded: its chunk {damaged[0].name.decode('latin-1')} is damaged")
    image = decode(content)
    if image.is_animated:
        raise BrokenImageError("is an animation")
    return image


def _format_of(content: bytes) -> str:
    if not content:
        raise BrokenImageError("is empty")
    head = content[:HEAD_BYTES]
    if image_format := sniff_image_format(head):
        return image_format
    if other := describe_other_content(head):
        raise BrokenImageError(f"is {other}, which is not read (save it as PNG or JPEG)")
    raise BrokenImageError(f"is not a {FORMAT_NAMES} image")


def _open(content: bytes, image_format: str) -> ImageFile.ImageFile:
    if image_format == "heic":
        try:
            from pillow_heif import HeifImageFile  # loads two codecs, and few data sets need it
        except ImportError:
            raise BrokenImageError("is a HEIC image, which needs the package pillow-heif") from None
        return HeifImageFile(io.BytesIO(content))
    if image_format == "avif" and not AvifImagePlugin.SUPPORTED:
        raise BrokenImageError("is an AVIF image, and this Pillow was built without AVIF (install Pillow with pip)")
    if image_format == "png":
        content = without_unread_chunks(content)
    return _READERS[image_format](io.BytesIO(content))


def _limit_size(image: ImageFile.ImageFile, image_format: str, *, scales_down: bool, least_px: int) -> int:
    """Refuse what is too large; let a JPEG be decoded at a fraction of its size. The factor by which other formats have to be
    scaled down, where that `scales_down`, or where fewer pixels are enough."""
    is_scaled = image_format == "jpeg" or scales_down
    limit = MAX_JPEG_PIXELS if is_scaled else MAX_PIXELS
    width, height = image.size
    if width * height > limit:
        raise BrokenImageError(f"has more than {limit:,} pixels")
    scales = (1, 2, 4, 8) if is_scaled else (1,)
    fitting = [scale for scale in scales if width * height <= MAX_PIXELS * scale**2 and max(width, height) <= MAX_SIDE_PX * scale]
    if not fitting:
        raise BrokenImageError(f"is longer than {MAX_SIDE_PX:,} pixels")
    enough = 2 * max(width, height) // (3 * least_px) if least_px else 1
    if image_format != "jpeg":
        return max(fitting[0], enough if image.mode in _REDUCIBLE else 1)
    scale = max(fitting[0], *(scale for scale in (1, 2, 4, 8) if scale <= max(1, enough)))
    if scale > 1:
        image.draft(None, (max(1, width // scale), max(1, height // scale)))
    return 1


@contextmanager
def _as_broken_image() -> Iterator[None]:
    """Turn whatever the readers raise for a file that cannot be decoded into a BrokenImageError."""
    try:
        yield
    except BrokenImageError:
        raise
    except Image.DecompressionBombError:
        raise BrokenImageError(f"has more than {MAX_PIXELS:,} pixels") from None
    except MemoryError:
        raise BrokenImageError("does not fit into memory") from None
    except ImportError as error:  # LittleCMS and libheif are built into the packages of Pillow and pillow-heif
        raise BrokenImageError(f"needs a library that is missing (install Pillow and pillow-heif with pip): {error}") from None
    except DECODER_ERRORS as error:
        if str(error) == "unknown pixel mode":
            raise BrokenImageError("is a TIFF image with pixels of a kind that is not read (save it as PNG)") from None
        raise BrokenImageError(f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}") from None


def _to_rgb(
    image: ImageFile.ImageFile, image_format: str, content: bytes, factor: int
) -> tuple[Image.Image, Image.Image | None, bool]:
    """The pixels as RGB in sRGB on white, scaled down by `factor`, their alpha channel unless it is opaque, and whether version 1.0
    had other pixels."""
    raw_mode = _raw_mode(image)
    image.load()
    is_revised = _scale_transparency(image, raw_mode)
    color, alpha = _split_alpha(image)
    if factor > 1:
        color, alpha = color.reduce(factor), alpha and alpha.reduce(factor)
    if image_format == "bmp" and alpha is not None and alpha.getextrema() == (0, 0):
        alpha, is_revised = None, True  # the fourth byte is unused: Windows shows such files opaque
    if color.mode.startswith("I") or color.mode == "F":
        # Version 1.0 took a dark image for one of 8 bits, and none of these images had transparent areas.
        is_revised |= alpha is not None or color.getextrema()[1] <= 255
        color = _sixteen_bit(color, raw_mode, white_is_zero=image_format == "tiff" and image.tag_v2.get(_PHOTOMETRIC) == 0)
    converted = to_srgb(color, _color_profile(image, image_format, content))
    is_revised |= converted is not color
    if converted.mode == "I;16":
        converted = Image.fromarray((np.asarray(converted) // 257).astype(np.uint8))
    rgb = converted.convert("RGB")
    if alpha is not None:
        rgb.putalpha(alpha)
        rgb = Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB")
        alpha = alpha if alpha.getextrema()[0] < 255 else None
    return rgb, alpha, is_revised


def _raw_mode(image: ImageFile.ImageFile) -> str:
    """How the file stores its pixels, as Pillow's decoders name it, such as I;12; empty where that is unknown."""
    arguments = image.tile[0].args if image.tile else ""
    raw_mode = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return raw_mode if isinstance(raw_mode, str) else ""


def _scale_transparency(image: ImageFile.ImageFile, raw_mode: str) -> bool:
    """Scale the transparent color of a PNG to 8 bits, like its pixels; whether that makes a difference."""
    color = image.info.get("transparency")
    if raw_mode == "RGB;16B" and isinstance(color, tuple):
        scaled, before = tuple(level >> 8 for level in color), tuple(level & 255 for level in color)
    elif raw_mode in _PNG_GREY_FACTORS and isinstance(color, int):
        scaled, before = color * _PNG_GREY_FACTORS[raw_mode], color
    else:
        return False
    image.info["transparency"] = scaled
    return scaled != before


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colors, in a mode without alpha or palette, and the alpha channel (mode L) if there is one."""
    transparency = image.info.get("transparency")
    if image.mode.startswith("I") or image.mode == "F":
        if transparency is None:
            return image, None
        return image, Image.fromarray(np.where(np.asarray(image) == transparency, 0, 255).astype(np.uint8))
    if image.mode == "La":
        image = image.convert("LA")
    if transparency is not None or image.mode in ("RGBA", "LA", "PA", "RGBa"):
        rgba = image.convert("RGBA")
        is_grey = image.mode in ("1", "L", "LA")
        return image.convert("L") if is_grey else rgba.convert("RGB"), rgba.getchannel("A")
    if image.mode in ("L", "RGB", "CMYK", "LAB"):
        return image, None
    return image.convert("L" if image.mode == "1" else "RGB"), None


def _sixteen_bit(image: Image.Image, raw_mode: str, *, white_is_zero: bool) -> Image.Image:
    """A grey image of 12, 16 or 32 bits as I;16: black and white are those of its number format, whatever values occur in it.

    Floats are 0..1. Negative numbers are black.
    """
    values = np.asarray(image)
    if image.mode == "F":
        values = np.nan_to_num(np.clip(values, 0, 1)) * 65535
    elif raw_mode == "I;12":
        values = values.astype(np.uint16) * 16 + (values >> 8)
    elif image.mode == "I" and raw_mode == "I;32N":
        values = values.view(np.uint32) >> 16
    elif image.mode == "I" and raw_mode.startswith("I;32"):
        values = np.maximum(values, 0) >> 15
    elif image.mode == "I":
        values = np.maximum(values, 0) * 2
    levels = values.astype(np.uint16)
    return Image.fromarray(65535 - levels if white_is_zero else levels)


def _color_profile(image: ImageFile.ImageFile, image_format: str, content: bytes) -> bytes | None:
    """The ICC profile of the pixels, embedded or made from what else the file states; None: sRGB, or nothing stated.

    The order is that of PNG's third edition: cICP, iCCP, sRGB, then gAMA and cHRM; for HEIC and AVIF that of ISO 23000-22.
    """
    info, is_grey = image.info, image.mode[0] in "1LIF" and image.mode != "LAB"
    chunks = {chunk.name: chunk for chunk in png_chunks(content)} if image_format == "png" else {}
    if b"cICP" in chunks and len(code_points := chunks[b"cICP"].data(content)) >= 2:
        return profile_of_code_points(code_points[0], code_points[1], is_grey)
    if icc := info.get("icc_profile"):
        return icc
    if image_format == "png" and "srgb" not in info and ("gamma" in info or "chromaticity" in info):
        return profile_of_gamma(info.get("gamma"), info.get("chromaticity"), is_grey)
    if image_format == "heic" and "nclx_profile" in info:
        nclx = info["nclx_profile"]
        return profile_of_code_points(nclx["color_primaries"], nclx["transfer_characteristics"], is_grey)
    if image_format == "avif" and 0 <= (start := content.find(b"colrnclx")) <= len(content) - 12:
        return profile_of_code_points(*struct.unpack_from(">HH", content, start + 8), is_grey)
    if image_format == "jpeg" and _exif_value(image, _INTEROPERABILITY_INDEX, ExifTags.IFD.Interop) == "R03":
        return adobe_rgb_profile()
    return None


def _exif_value(image: ImageFile.ImageFile, tag: int, folder: int | None = None) -> object:
    """A value of the image's EXIF data; None if there is none, or the data are damaged."""
    try:
        exif = image.getexif()
        value = (exif if folder is None else exif.get_ifd(folder)).get(tag)
    except DECODER_ERRORS:
        return None
    return value.strip("\0 ") if isinstance(value, str) else value
