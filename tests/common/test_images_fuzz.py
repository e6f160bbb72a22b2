"""Whatever a damaged or hostile image file holds: it is decoded to RGB within the limits, or one line says what is wrong.

`make test` runs the same few examples each time, `make fuzz` new ones for minutes.
"""

import io
import time
from collections.abc import Callable

import numpy as np
import pillow_heif
import pytest
from color_profiles import P3, cmyk_profile, gamma_curve, grey_profile, rgb_profile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from common import images
from common.images import BrokenImageError, DecodedImage, decode, verify_download

pytestmark = [pytest.mark.fuzz, pytest.mark.timeout(3600)]

TOO_LONG_S = 20.0
"""For one example, on a loaded machine, too."""


def real_files() -> list[bytes]:
    """Small images of every format with everything that the decoder reads: profiles, EXIF, transparency, frames, depth."""
    pillow_heif.register_heif_opener()
    rgba = Image.fromarray(np.random.default_rng(2).integers(0, 256, (24, 32, 4)).astype(np.uint8), "RGBA")
    rgb, deep = rgba.convert("RGB"), Image.fromarray(np.arange(768, dtype=np.uint16).reshape(24, 32) * 80)
    exif = Image.Exif()
    exif[0x0112] = 6
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    text = PngInfo()
    text.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>', zip=True)
    text.add_text("workflow", "{}" * 100, zip=True)
    wide, frames = rgb_profile(P3, gamma_curve(2.2)), {"save_all": True}
    kinds = [
        (rgb, "PNG", {"icc_profile": wide, "exif": exif, "pnginfo": text}),
        (rgb.quantize(16), "PNG", {"transparency": bytes(range(0, 256, 16))}),
        (deep, "PNG", {"transparency": 80, "icc_profile": grey_profile(1.8)}),
        (rgba, "PNG", frames),
        (rgb, "JPEG", {"exif": exif}),
        (rgb, "JPEG", {"icc_profile": wide, "progressive": True}),
        (rgb.convert("CMYK"), "JPEG", {"icc_profile": cmyk_profile()}),
        (rgb, "MPO", frames),
        (rgba, "WEBP", {"icc_profile": wide, "exif": exif}),
        (rgba, "WEBP", {"lossless": True}),
        (rgba, "WEBP", frames),
        (rgb, "BMP", {}),
        (rgb.quantize(16), "BMP", {}),
        (rgb, "TIFF", {"compression": "tiff_lzw", "icc_profile": wide}),
        (deep, "TIFF", {"tiffinfo": {262: 0, 274: 8}}),
        (rgba, "TIFF", frames),
        (Image.fromarray(np.asarray(deep).astype(np.float32)), "TIFF", {}),
        (rgba, "HEIF", {"icc_profile": wide, "exif": exif.tobytes()}),
        (rgba, "AVIF", {"exif": exif}),
        (rgb, "AVIF", frames),
    ]
    files = []
    for image, image_format, options in kinds:
        stream = io.BytesIO()
        if "save_all" in options:
            options = options | {"append_images": [image.rotate(180)]}
        image.copy().save(stream, image_format, **options)  # `save` leaves settings in the image
        files.append(stream.getvalue())
    return files


FILES = real_files()
positions = st.integers(0, 400) | st.integers(0, 1 << 16)
pieces = st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\0\0\x10\0"])
edits = st.lists(st.tuples(st.sampled_from(["replace", "insert", "remove", "cut", "repeat"]), positions, pieces), max_size=6)


def edited(content: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
    for kind, position, piece in edits:
        position %= len(content) + 1
        before, after = content[:position], content[position:]
        content = {
            "replace": before + piece + after[len(piece) :],
            "insert": before + piece + after,
            "remove": before + after[len(piece) :],
            "cut": before,
            "repeat": before + after[:64] * piece[0] + after,
        }[kind]
    return content


def outcome_of(decoder: Callable[[bytes], DecodedImage], content: bytes) -> DecodedImage | BrokenImageError:
    try:
        return decoder(content)
    except BrokenImageError as error:
        return error


def test_the_files_are_decoded_as_they_are():
    assert {decode(content).rgb.size for content in FILES} == {(32, 24), (24, 32)}
    assert sum(decode(content).is_animated for content in FILES) == 3


@pytest.mark.filterwarnings("ignore")
@given(st.sampled_from(FILES), edits)
@settings(max_examples=20 * settings.default.max_examples, deadline=None)
def test_damaged_files_are_decoded_or_refused_in_one_line(content, edits):
    content = edited(content, edits)
    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:  # the same rules for smaller images, so that an example takes milliseconds
        patch.setattr(images, "MAX_PIXELS", 1 << 18)
        patch.setattr(images, "MAX_JPEG_PIXELS", 1 << 20)
        for decoder in (decode, verify_download):
            outcome = outcome_of(decoder, content)
            if isinstance(outcome, BrokenImageError):
                assert len(str(outcome).splitlines()) == 1
            else:
                assert outcome.rgb.mode == "RGB"
                assert 0 < outcome.rgb.width * outcome.rgb.height <= images.MAX_PIXELS
    assert time.monotonic() - began < TOO_LONG_S
