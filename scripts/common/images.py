"""Decoding and verifying images: one set of formats, size limits and error messages for every stage."""

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from common.dataset_layout import IMAGE_FORMATS, sniff_image_format

DOWNLOAD_FORMATS = ("png", "jpeg", "webp")
"""What ComfyUI's nodes save."""
DOWNLOAD_SUFFIXES = tuple(suffix for name in DOWNLOAD_FORMATS for suffix in IMAGE_FORMATS[name])

MAX_SIDE_PX = 16384
"""Of the longer side: taggers pad an image to a square, whose memory grows with the square of that side."""

_PNG_END = b"IEND\xae\x42\x60\x82"
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, TypeError, AttributeError, struct.error)
"""What Pillow raises for damaged files; the last three for malformed EXIF."""

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `_check_size` refuses such images, in every thread alike


class BrokenImageError(ValueError):
    """The image cannot be used. The message is a predicate that says why, such as "is empty"."""


def open_rgb(path: Path) -> Image.Image:
    """The image at `path`, decoded completely, rotated as its EXIF orientation says, as 8-bit RGB on white.

    Palette, grey, CMYK and 16-bit images are converted; of an animation the first frame is taken.
    Raises BrokenImageError for a file that cannot be read, is not a PNG, JPEG, WebP or BMP image, is damaged, or exceeds
    Pillow's pixel limit or MAX_SIDE_PX.
    """
    with _as_broken_image(), path.open("rb") as file:
        head = file.read(12)
        if sniff_image_format(head) is None:
            raise BrokenImageError("is not a PNG, JPEG, WebP or BMP image" if head else "is empty")
        file.seek(0)
        with Image.open(file) as image:
            _check_size(image)
            image.load()
            return _on_white(ImageOps.exif_transpose(image))


def verify_download(content: bytes) -> tuple[str, tuple[int, int]]:
    """Format (one of DOWNLOAD_FORMATS), and width and height in pixels, of the downloaded image file `content`.

    Raises BrokenImageError unless it is a complete still image within the limits of `open_rgb`.
    """
    image_format = sniff_image_format(content[:12])
    if image_format not in DOWNLOAD_FORMATS:
        raise BrokenImageError("is not a PNG, JPEG or WebP image" if content else "is empty")
    if image_format == "png" and _PNG_END not in content:
        raise BrokenImageError("is cut off")
    with _as_broken_image():
        with Image.open(io.BytesIO(content)) as image:
            _check_size(image)
            image.verify()
        # verify() reads the checksums up to the end of the file, but leaves the image unusable.
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            if getattr(image, "n_frames", 1) > 1:
                raise BrokenImageError("is an animation")
            return image_format, image.size


def _check_size(image: Image.Image) -> None:
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError
    if max(image.size) > MAX_SIDE_PX:
        raise BrokenImageError(f"is longer than {MAX_SIDE_PX:,} pixels")


@contextmanager
def _as_broken_image() -> Iterator[None]:
    """Turn whatever the system and Pillow raise for a file that cannot be decoded into a BrokenImageError."""
    try:
        yield
    except BrokenImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # the latter where warnings are errors
        raise BrokenImageError(f"has more than {Image.MAX_IMAGE_PIXELS:,} pixels") from None
    except UnidentifiedImageError:
        raise BrokenImageError("cannot be decoded: its header is damaged") from None
    except _DECODER_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise BrokenImageError(f"cannot be read: {error.strerror}") from None
        raise BrokenImageError(f"cannot be decoded: {error}") from None


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _eight_bit(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """A 16- or 32-bit grey image scaled to 8 bits; Pillow's own conversion would clip everything above 255."""
    low, high = image.getextrema()
    top = 1.0 if high <= 1 and image.mode == "F" else 255.0 if low >= 0 and high <= 255 else 65535.0
    return image.convert("F").point(lambda value: value * (255.0 / top)).convert("L")
