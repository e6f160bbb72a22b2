"""Images on the disk and downloaded images go through one decoder, with the same limits and the same words."""

import io
import re
import struct
import subprocess
import sys
import zlib

import numpy as np
import pillow_heif
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from common import images
from common.image_formats import HEAD_BYTES, IMAGE_FORMATS, sniff_image_format
from common.images import DECODER_REVISION, BrokenImageError, decode, open_rgb, read_image, verify_download
from common.settings import REPOSITORY

pillow_heif.register_heif_opener()
ORIENTATION = 0x0112


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, image_format, **options)
    return content.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (48, 32)) -> Image.Image:
    levels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 4)).astype(np.uint8)
    return Image.fromarray(levels, "RGBA").convert(mode)


def png(size: tuple[int, int], depth: int, color: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG from its raw rows, each with its filter byte, for what Pillow does not write."""
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", *size, depth, color, 0, 0, 0)),
        *chunks,
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    framed = [struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def bmp(rgb: np.ndarray, alpha: np.ndarray) -> bytes:
    """A BMP of version 5 with an alpha mask, as Windows and Photoshop write it."""
    height, width = alpha.shape
    rows = np.dstack([rgb[:, :, ::-1], alpha])[::-1].tobytes()
    header = struct.pack("<IiiHHIIiiII", 124, width, height, 1, 32, 3, len(rows), 2835, 2835, 0, 0)
    header += struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"sRGB"
    return b"BM" + struct.pack("<IHHI", 138 + len(rows), 0, 0, 138) + header.ljust(124, b"\0") + rows


def on_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None].astype(float) / 255
    return rgb * share + 255 * (1 - share)


def distance(content: bytes, expected: np.ndarray) -> float:
    return float(np.abs(np.asarray(decode(content).rgb, dtype=float) - expected).max())


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((16_384, 8), None),
        ((16_385, 8), "is longer than 16,384 pixels"),
        ((8, 16_385), "is longer than 16,384 pixels"),
        ((10_000, 8_950), "has more than 89,478,485 pixels"),
    ],
)
def test_both_ways_have_the_same_limits(tmp_path, size, message):
    content = encoded(Image.new("1", size), "PNG")
    (tmp_path / "a.png").write_bytes(content)
    for decode_once in (lambda: open_rgb(tmp_path / "a.png").size, lambda: verify_download(content).rgb.size):
        if message is None:
            assert decode_once() == size
        else:
            with pytest.raises(BrokenImageError, match=message):
                decode_once()


ENCODERS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP", "bmp": "BMP", "tiff": "TIFF", "heic": "HEIF", "avif": "AVIF"}
"""Format -> Pillow's name of it."""


@pytest.mark.parametrize("image_format", IMAGE_FORMATS)
def test_formats(tmp_path, image_format):
    """Whatever the name says: the content decides."""
    content = encoded(Image.new("RGB", (40, 30), "red"), ENCODERS[image_format])
    (tmp_path / "a.image").write_bytes(content)
    image = read_image(tmp_path / "a.image")
    assert (image.rgb.size, image.rgb.mode, image.format, image.is_animated, image.revision) == (
        (40, 30),
        "RGB",
        image_format,
        False,
        "",
    )
    assert image.rgb.getpixel((20, 15)) >= (250, 0, 0)
    assert verify_download(content).format == image_format


def test_documented_formats_and_limits():
    page = (REPOSITORY / "docs" / "images.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (PNG|JPEG|WebP|BMP|TIFF|HEIC|AVIF) \| (.*) \|$", page, re.MULTILINE)
    assert {name.lower(): tuple(re.findall(r"`(\.\w+)`", suffixes)) for name, suffixes in rows} == IMAGE_FORMATS
    for limit in (images.MAX_PIXELS, images.MAX_SIDE_PX, images.MAX_JPEG_PIXELS):
        assert f"{limit:,}" in page
    assert f"{images.MAX_FILE_BYTES >> 20} MiB" in page


def test_heic_and_avif_are_told_apart_by_their_brands():
    def head(*brands: bytes) -> bytes:
        return struct.pack(">I", 12 + 4 * len(brands)) + b"ftyp" + brands[0] + bytes(4) + b"".join(brands[1:])

    found = [head(b"mif1", b"heic"), head(b"mif1", b"avif", b"miaf"), head(b"mif1"), head(b"avis", b"msf1"), head(b"isom", b"mp41")]
    assert [sniff_image_format(content[:HEAD_BYTES]) for content in found] == ["heic", "avif", "heic", "avif", None]


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp", "tiff", "heic", "avif"])
def test_truncated_files_are_refused_by_both(tmp_path, image_format):
    content = encoded(noise(size=(200, 150)), ENCODERS[image_format])
    content = content[: len(content) // 2]
    (tmp_path / "a.image").write_bytes(content)
    with pytest.raises(BrokenImageError, match="cannot be decoded"):
        open_rgb(tmp_path / "a.image")
    with pytest.raises(BrokenImageError, match=r"cannot be decoded|is cut off"):
        verify_download(content)


def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path, monkeypatch):
    with pytest.raises(BrokenImageError, match="cannot be read: No such file or directory"):
        open_rgb(tmp_path / "missing.png")
    with pytest.raises(BrokenImageError, match="cannot be read: Is a directory"):
        open_rgb(tmp_path)
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 1 << 20)
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate((1 << 20) + 1)
    with pytest.raises(BrokenImageError, match="is larger than 1 MiB"):
        open_rgb(tmp_path / "large.png")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (encoded(noise(), "GIF"), "is a GIF, which is not read"),
        (b"8BPS\0\1" + bytes(40), "is a Photoshop document"),
        (b"\xff\x0a" + bytes(40), "is a JPEG XL image"),
        (b"\0\0\0\x18ftypisom" + bytes(40), "is a video"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is an SVG drawing"),
    ],
)
def test_other_formats_are_named_with_a_remedy(content, words):
    with pytest.raises(BrokenImageError, match=rf"{words}.*\(save it as PNG or JPEG\)"):
        decode(content)


def test_the_photos_of_the_largest_phones_are_decoded_at_half_their_size():
    """200 megapixels in one JPEG, in black and white to save time."""
    content = encoded(Image.new("L", (16_320, 12_240), 77), "JPEG")
    decoded = verify_download(content)
    assert (decoded.rgb.size, decoded.rgb.getpixel((8_000, 6_000))) == ((8_160, 6_120), (77, 77, 77))


def test_limits_of_jpeg_are_its_own():
    assert decode(encoded(Image.new("L", (40_000, 16)), "JPEG")).rgb.size == (10_000, 4)
    claimed = bytearray(encoded(Image.new("L", (64, 64)), "JPEG"))
    start = claimed.index(b"\xff\xc0") + 5
    claimed[start : start + 4] = struct.pack(">HH", 16_384, 16_385)
    with pytest.raises(BrokenImageError, match="has more than 268,435,456 pixels"):
        decode(bytes(claimed))


def bombs() -> dict[str, bytes]:
    """Files of a few bytes that claim more pixels than there is memory for."""
    claimed = {"png": png((60_000, 60_000), 8, 2, b"\0")}
    tiff = bytearray(encoded(Image.new("RGB", (64, 64)), "TIFF"))
    for tag in (256, 257):
        start = tiff.index(struct.pack("<HHI", tag, 4, 1)) + 8
        tiff[start : start + 4] = struct.pack("<I", 60_000)
    bitmap = bytearray(encoded(Image.new("RGB", (64, 64)), "BMP"))
    bitmap[18:26] = struct.pack("<ii", 60_000, 60_000)
    webp = bytearray(encoded(noise("RGBA"), "WEBP"))
    webp[24:30] = (16_382).to_bytes(3, "little") * 2
    heic, avif = (bytearray(encoded(noise(), name)) for name in ("HEIF", "AVIF"))
    for content in (heic, avif):
        start = content.index(b"ispe") + 8
        content[start : start + 8] = struct.pack(">II", 60_000, 60_000)
    return claimed | {
        name: bytes(each) for name, each in {"tiff": tiff, "bmp": bitmap, "webp": webp, "heic": heic, "avif": avif}.items()
    }


def test_bombs_are_refused_before_memory_is_taken(tmp_path):
    """In a process of its own, whose memory is measured."""
    for name, content in bombs().items():
        (tmp_path / name).write_bytes(content)
    program = f"""
import pathlib, resource, sys
sys.path.insert(0, {str(REPOSITORY / "scripts")!r})
from common.images import BrokenImageError, open_rgb
import pillow_heif
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in pathlib.Path({str(tmp_path)!r}).iterdir():
    try:
        open_rgb(path)
    except BrokenImageError as error:
        print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stderr, done.returncode) == ("", 0)
    *messages, taken_mib = done.stdout.splitlines()
    assert len(messages) == len(bombs())
    for message in messages:
        assert message.startswith(("has more than", "is longer than", "cannot be decoded"))
    assert int(taken_mib) < 64


@pytest.mark.parametrize("image_format", ["WEBP", "PNG", "AVIF"])
def test_animations_are_told_from_stills_and_their_first_frame_counts(image_format):
    frames = [Image.new("RGB", (64, 64), color) for color in ("red", "blue", "lime")]
    content = encoded(frames[0], image_format, save_all=True, append_images=frames[1:])
    assert decode(content).is_animated
    assert decode(content).rgb.getpixel((9, 9)) >= (250, 0, 0)
    with pytest.raises(BrokenImageError, match="is an animation"):
        verify_download(content)


@pytest.mark.parametrize("image_format", ["MPO", "TIFF", "HEIF"])
def test_the_first_of_several_images_in_a_still_file_counts(image_format):
    """Previews and depth maps of phones and cameras, pages of a scanner."""
    photo = Image.new("RGB", (160, 120), (200, 30, 30))
    content = encoded(photo, image_format, save_all=True, append_images=[Image.new("RGB", (80, 60), "blue")], quality=95)
    image = verify_download(content)
    assert (image.is_animated, image.rgb.size, image.revision) == (False, (160, 120), "")
    assert image.rgb.getpixel((9, 9))[0] > 190


def test_mpo_whose_index_is_damaged_is_still_its_first_image():
    photo = Image.new("RGB", (160, 120), (200, 30, 30))
    content = encoded(photo, "MPO", save_all=True, append_images=[photo])
    start = content.index(b"MPF\0") + 8
    assert decode(content[:start] + b"\xff" * 20 + content[start + 20 :]).rgb.size == (160, 120)


# Transparency


@pytest.mark.parametrize(
    ("mode", "image_format"),
    [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF"), ("LA", "TIFF"), ("RGBA", "AVIF"), ("RGBA", "HEIF")],
)
def test_transparent_areas_are_white(mode, image_format):
    image = Image.new("RGBA", (64, 64), (20, 90, 160, 255)).convert(mode)
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (0, 0, 32, 64))
    image.putalpha(alpha)
    rgb = decode(encoded(image, image_format, lossless=True, quality=-1 if image_format == "HEIF" else 100)).rgb
    assert min(rgb.getpixel((10, 10))) >= 253
    assert rgb.getpixel((50, 50)) == pytest.approx(image.convert("RGB").getpixel((50, 50)), abs=4)


@pytest.mark.parametrize("samples", [3, 1])
def test_premultiplied_colors_of_tiff(samples):
    """Associated alpha (ExtraSamples 1): the colors have been multiplied by it."""
    alpha = np.full((32, 32), 128, np.uint8)
    mode = "RGBA" if samples == 3 else "LA"
    color = (60, 10, 100) if samples == 3 else (60,)
    pixels = np.dstack([np.full((32, 32), level, np.uint8) for level in color] + [alpha])
    content = bytearray(encoded(Image.fromarray(pixels, mode), "TIFF"))
    content[content.index(struct.pack("<HHI", 338, 3, 1)) + 8] = 1
    expected = [level + 127 for level in (color if samples == 3 else color * 3)]
    assert decode(bytes(content)).rgb.getpixel((5, 5)) == pytest.approx(expected, abs=2)


def test_palette_with_an_opacity_for_each_color():
    image = noise().quantize(8)
    opacities = bytes(range(0, 256, 36))[:8]
    rgb, alpha = np.asarray(image.convert("RGB")), np.array(list(opacities), np.uint8)[np.asarray(image)]
    assert distance(encoded(image, "PNG", transparency=opacities), on_white(rgb, alpha)) <= 1
    assert distance(encoded(image, "PNG", transparency=3), on_white(rgb, np.where(np.asarray(image) == 3, 0, 255))) == 0


@pytest.mark.parametrize(
    ("mode", "transparent", "pixel"), [("RGB", (9, 8, 7), (9, 8, 7)), ("L", 9, 9), ("1", 0, 0), ("1", 255, 255), ("I;16", 258, 258)]
)
def test_one_color_that_stands_for_transparent(mode, transparent, pixel):
    if mode == "I;16":
        image = Image.fromarray(np.repeat([[pixel, pixel + 1]], 10, axis=1).astype(np.uint16).repeat(10, axis=0))
    else:
        image = Image.new(mode, (20, 10), pixel)
        image.paste({"RGB": (9, 8, 6), "L": 10, "1": 255 - pixel if mode == "1" else 0}[mode], (10, 0, 20, 10))
    decoded = decode(encoded(image, "PNG", transparency=transparent))
    left, right = decoded.rgb.getpixel((2, 2)), decoded.rgb.getpixel((12, 2))
    assert left == (255, 255, 255)
    assert right == {"RGB": (9, 8, 6), "L": (10,) * 3, "1": (255 - pixel if mode == "1" else 0,) * 3, "I;16": (1,) * 3}[mode]
    assert decoded.revision == (DECODER_REVISION if mode == "I;16" else "")


def test_transparent_color_of_depths_that_become_eight_bits():
    four_bit = png((2, 1), 4, 0, b"\0\xf7", (b"tRNS", struct.pack(">H", 7)))
    assert [decode(four_bit).rgb.getpixel((x, 0)) for x in (0, 1)] == [(255,) * 3, (255,) * 3]
    assert decode(png((2, 1), 4, 0, b"\0\xf7")).rgb.getpixel((1, 0)) == (119,) * 3
    color = struct.pack(">3H", 0x1234, 0x5678, 0x9ABC)
    sixteen_bit = png((2, 1), 16, 2, b"\0" + color + struct.pack(">3H", 0x1334, 0x5678, 0x9ABC), (b"tRNS", color))
    assert [decode(sixteen_bit).rgb.getpixel((x, 0)) for x in (0, 1)] == [(255,) * 3, (0x13, 0x56, 0x9A)]
    assert decode(four_bit).revision == decode(sixteen_bit).revision == DECODER_REVISION


def test_bitmap_whose_alpha_is_zero_everywhere_is_opaque():
    rgb = np.asarray(noise())
    empty, real = np.zeros(rgb.shape[:2], np.uint8), np.asarray(noise("L"))
    assert distance(bmp(rgb, empty), rgb) == 0
    assert decode(bmp(rgb, empty)).revision == DECODER_REVISION
    assert distance(bmp(rgb, real), on_white(rgb, real)) <= 1
    assert decode(bmp(rgb, real)).revision == ""


def test_png_that_is_transparent_everywhere_is_white():
    assert decode(encoded(Image.new("RGBA", (9, 9), (1, 2, 3, 0)), "PNG")).rgb.getextrema() == ((255, 255),) * 3


# Depth


@pytest.mark.parametrize("brightest", [1, 255, 256, 4095, 65535])
@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_by_its_range(brightest, image_format):
    levels = np.linspace(0, brightest, 900).reshape(30, 30).astype(np.uint16)
    decoded = decode(encoded(Image.fromarray(levels), image_format))
    assert (np.asarray(decoded.rgb) == (levels // 257)[..., None]).all()
    assert decoded.revision == (DECODER_REVISION if brightest <= 255 else "")


def test_white_is_zero():
    """Pillow inverts 8 bits itself."""
    levels = np.linspace(0, 65535, 900).reshape(30, 30).astype(np.uint16)
    content = encoded(Image.fromarray(levels), "TIFF", tiffinfo={262: 0})
    assert distance(content, np.repeat(((65535 - levels) // 257)[..., None], 3, axis=2)) == 0


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        (np.array([[-1, 0, 0.5, 1, 7, np.nan]], np.float32), [0, 0, 127, 255, 255, 0]),
        (np.array([[-5, 0, 2**30, 2**31 - 1]], np.int32), [0, 0, 127, 255]),
    ],
)
def test_grey_of_32_bits(levels, expected):
    rgb = decode(encoded(Image.fromarray(levels), "TIFF")).rgb
    assert list(np.asarray(rgb)[0, :, 0]) == pytest.approx(expected, abs=1)


def test_tiff_of_pixels_that_are_not_read():
    content = encoded(Image.new("RGB", (20, 20)), "TIFF")
    start = content.index(struct.pack("<HHI", 262, 3, 1)) + 8
    with pytest.raises(BrokenImageError, match=r"pixels of a kind that is not read \(save it as PNG\)"):
        decode(content[:start] + struct.pack("<I", 32803) + content[start + 4 :])


def test_sixteen_bit_color_is_read():
    rows = b"\0" + struct.pack(">6H", 65535, 256, 0, 32768, 32767, 1)
    assert np.asarray(decode(png((2, 1), 16, 2, rows)).rgb).tolist() == [[[255, 1, 0], [128, 127, 0]]]


# Metadata


@pytest.mark.parametrize("chunk", ["zTXt", "iTXt", "compressed iTXt", "iCCP"])
def test_large_metadata_of_png(chunk):
    """Several times Pillow's limits."""
    rows = b"".join(b"\0" + row.tobytes() for row in np.asarray(noise()))
    if chunk == "iCCP":
        content = encoded(noise(), "PNG", icc_profile=bytes(20_000_000))
    elif chunk == "zTXt":
        workflow = (b"zTXt", b"workflow\0\0" + zlib.compress(b"y" * 3_000_000))
        content = png((48, 32), 8, 2, rows, *[workflow] * 70)
    else:
        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", "y" * 20_000_000, zip=chunk.startswith("c"))
        content = encoded(noise(), "PNG", pnginfo=info)
    assert decode(content).rgb.tobytes() == verify_download(content).rgb.tobytes() == noise().tobytes()
    assert decode(content).revision == ""


def test_damage_to_text_matters_for_downloads_only():
    content = bytearray(encoded(noise(), "PNG", pnginfo=(info := PngInfo()).add_text("prompt", "x" * 100) or info))
    content[content.index(b"xxxx")] = 1
    assert decode(bytes(content)).rgb.tobytes() == noise().tobytes()
    with pytest.raises(BrokenImageError, match="its chunk tEXt is damaged"):
        verify_download(bytes(content))


def oriented(value: object) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = value
    return exif.tobytes()


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF", "HEIF", "AVIF", "MPO"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(image_format, orientation):
    """The stored pixels are those of an upright image, turned the other way."""
    upright = Image.new("RGB", (96, 64), "white")
    upright.paste("red", (0, 0, 48, 32))
    back = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    turn = images._TRANSPOSITIONS.get(orientation)
    stored = upright if turn is None else upright.transpose(back.get(orientation, turn))
    options = {"tiffinfo": {274: orientation}} if image_format == "TIFF" else {"exif": oriented(orientation)}
    rgb = decode(encoded(stored, image_format, quality=95, **options)).rgb
    assert rgb.size == (96, 64)
    assert rgb.getpixel((10, 10)) == pytest.approx((255, 0, 0), abs=20)
    assert rgb.getpixel((80, 50)) == pytest.approx((255, 255, 255), abs=20)


def test_orientation_in_xmp_of_png():
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta tiff:Orientation="6"/>', zip=True)
    assert decode(encoded(noise(), "PNG", pnginfo=info)).rgb.size == (32, 48)


@pytest.mark.parametrize(
    "exif",
    [b"Exif\0\0" + bytes(range(60)), b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12\0\3" * 30, oriented(77)],
)
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.filterwarnings("ignore")
def test_broken_exif_is_ignored(exif, image_format):
    assert decode(encoded(noise(), image_format, exif=exif)).rgb.size == (48, 32)


def test_heic_is_not_imported_before_it_is_needed():
    program = "import sys; import common.images; print('pillow_heif' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY / "scripts", capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
