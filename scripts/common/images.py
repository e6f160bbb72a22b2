"""An image file as the pixels a person sees: upright, in RGB, transparency on white."""

import struct
import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

_DECODERS_ERRORS = (OSError, SyntaxError, ValueError, TypeError, AttributeError, struct.error)
"""What Pillow raises for damaged files; the last three for EXIF that makes no sense."""


LONGEST_PX = 16384
"""Of a side; taggers look at a square around the image, whose memory grows with the square of it."""


warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # such images are refused here, in every thread alike


class BrokenImageError(ValueError):
    """The file is not an image that can be used; the message says why."""


def open_rgb(path: Path) -> Image.Image:
    """The image at `path`, decoded in full, turned as its EXIF orientation says, as 8-bit RGB on white.

    Palette, grey, CMYK and 16-bit images are converted; of an animation the first frame is taken.
    Raises BrokenImageError for files that are no images, cut off, larger than Pillow's bomb limit, or too long.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError
            if max(image.size) > LONGEST_PX:
                raise BrokenImageError(f"is longer than {LONGEST_PX:,} pixels")
            image.load()
            return _on_white(ImageOps.exif_transpose(image))
    except BrokenImageError:
        raise
    except UnidentifiedImageError:
        raise BrokenImageError("is not an image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BrokenImageError(f"has more than {Image.MAX_IMAGE_PIXELS:,} pixels") from None
    except FileNotFoundError:
        raise BrokenImageError("has disappeared") from None
    except PermissionError:
        raise BrokenImageError("may not be read by this user") from None
    except _DECODERS_ERRORS as error:
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
