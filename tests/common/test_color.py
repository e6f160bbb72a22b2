"""Pixels are those that a color-managed viewer shows, compared with LittleCMS, with formulas, and with known photographs."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from color_profiles import ADOBE_RGB, P3, cmyk_profile, gamma_curve, grey_profile, icc_file, parametric_curve, rgb_profile
from PIL import Image, ImageCms

from common.images import DECODER_REVISION, DecodedImage, decode

SRGB_CURVE = parametric_curve(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
SRGB_PRIMARIES = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))
WIDE = {
    "Display P3": rgb_profile(P3, SRGB_CURVE, version=4),
    "Adobe RGB": rgb_profile(ADOBE_RGB, gamma_curve(563 / 256)),
}
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def squares(mode: str = "RGB") -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 256, (12, 12, 4)).astype(np.uint8)
    image = Image.fromarray(levels, "RGBA").resize((96, 96), Image.Resampling.NEAREST)
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def encoded(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


def with_chunk(content: bytes, name: bytes, data: bytes) -> bytes:
    """A PNG with one more chunk after its header."""
    chunk = struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return content[:33] + chunk + content[33:]


def shown(image: Image.Image, profile: bytes) -> np.ndarray:
    """What LittleCMS makes of it: relative colorimetric, with black point compensation."""
    intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
    source, target = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
    return np.asarray(ImageCms.profileToProfile(image, source, target, intent, outputMode="RGB", flags=flags), dtype=float)


def numbers_in(content: bytes) -> Image.Image:
    """The colors in the file, not converted."""
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGB")


def distance(decoded: DecodedImage, expected: np.ndarray) -> float:
    return float(np.abs(np.asarray(decoded.rgb, dtype=float) - expected).max())


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "TIFF"])
def test_wide_gamuts_are_converted_to_srgb(name, image_format):
    content = encoded(squares(), image_format, icc_profile=WIDE[name], lossless=True)
    decoded = decode(content)
    assert distance(decoded, shown(squares(), WIDE[name])) <= 1
    assert distance(decoded, np.asarray(squares(), dtype=float)) > 40
    assert decoded.revision == DECODER_REVISION


@pytest.mark.parametrize("image_format", ["JPEG", "AVIF", "HEIF", "MPO"])
def test_profiles_of_photographs_in_every_format(image_format, heif_writer):
    content = encoded(Image.new("RGB", (64, 64), (40, 200, 60)), image_format, icc_profile=WIDE["Display P3"], quality=100)
    assert distance(decode(content), shown(numbers_in(content), WIDE["Display P3"])) <= 1
    assert decode(content).rgb.getpixel((9, 9))[0] == 0  # P3's green is outside of sRGB


@pytest.fixture
def heif_writer():
    import pillow_heif

    pillow_heif.register_heif_opener()


def test_a_photograph_in_adobe_rgb():
    """Ships with scikit-image; its red letters are duller when its numbers are taken for sRGB's."""
    path = Path(skimage.data.__file__).with_name("rocket.jpg")
    with Image.open(path) as file:
        numbers, profile = file.convert("RGB"), file.info["icc_profile"]
    decoded = decode(path.read_bytes())
    assert distance(decoded, shown(numbers, profile)) <= 1
    assert distance(decoded, np.asarray(numbers, dtype=float)) > 20


BROKEN = {
    "noise": bytes(range(256)) * 4,
    "cut off": WIDE["Adobe RGB"][:200],
    "empty tags": icc_file(b"RGB ", {}),
    "grey profile of a color image": grey_profile(1.0),
    "profile of a printer": cmyk_profile(),
    "link between devices": icc_file(b"RGB ", {b"A2B0": b""}, kind=b"link", connection=b"RGB "),
    "profile for output only": icc_file(b"RGB ", {b"B2A0": bytes(40)}, kind=b"prtr", connection=b"Lab "),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_profile_that_makes_no_sense_is_ignored(name):
    decoded = decode(encoded(squares(), icc_profile=BROKEN[name]))
    assert (distance(decoded, np.asarray(squares(), dtype=float)), decoded.revision) == (0, "")


@pytest.mark.parametrize("profile", [SRGB, rgb_profile(SRGB_PRIMARIES, SRGB_CURVE)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_srgb_itself_changes_no_pixel(mode, profile):
    image = squares(mode)
    without, decoded = decode(encoded(image)), decode(encoded(image, icc_profile=profile))
    assert (decoded.rgb.tobytes(), decoded.revision) == (without.rgb.tobytes(), "")


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_transparency_is_kept_and_the_colors_under_it_are_converted(mode):
    profile = WIDE["Display P3"]
    if mode == "RGBA":
        image = squares("RGBA")
        alpha = np.asarray(image.getchannel("A"), dtype=float)[..., None] / 255
    else:
        image = squares().quantize(32)
        alpha = (np.asarray(image) != 5).astype(float)[..., None]
    content = encoded(image, icc_profile=profile, **({"transparency": 5} if mode == "P" else {}))
    expected = shown(image.convert("RGB"), profile) * alpha + 255 * (1 - alpha)
    assert distance(decode(content), expected) <= 2


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_grey_profiles(mode):
    image = squares(mode) if mode != "LA" else Image.merge("LA", (squares("L"), Image.new("L", (96, 96), 255)))
    levels = np.asarray(image.convert("L"), dtype=float)
    decoded = decode(encoded(image, icc_profile=grey_profile(1.0)))
    linear = levels / 255
    expected = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055)
    assert distance(decoded, np.repeat(expected[..., None], 3, axis=2)) <= 2


def test_grey_in_the_color_space_of_an_rgb_profile():
    profile = rgb_profile(ADOBE_RGB, gamma_curve(1.0))
    assert (
        distance(
            decode(encoded(squares("L"), "JPEG", quality=100, icc_profile=profile)), shown(squares("L").convert("RGB"), profile)
        )
        <= 3
    )


def test_sixteen_bit_grey_keeps_its_precision_in_a_linear_profile():
    levels = np.array([[0, 100, 1000, 32768, 65535]], np.uint16)
    decoded = decode(encoded(Image.fromarray(levels), icc_profile=grey_profile(1.0)))
    assert np.abs(np.asarray(decoded.rgb)[0, :, 0].astype(int) - (0, 5, 33, 188, 255)).max() <= 1


@pytest.mark.parametrize("image_format", ["JPEG", "TIFF"])
def test_cmyk_with_a_printer_s_profile(image_format):
    image = squares("CMYK") if image_format == "TIFF" else Image.new("CMYK", (64, 64), (200, 40, 10, 30))
    profile = cmyk_profile()
    decoded = decode(encoded(image, image_format, icc_profile=profile, quality=100))
    assert distance(decoded, shown(image, profile)) <= 3
    assert distance(decoded, np.asarray(image.convert("RGB"), dtype=float)) > 30
    without = decode(encoded(image, image_format, quality=100))
    assert (distance(without, np.asarray(image.convert("RGB"), dtype=float)) <= 3, without.revision) == (True, "")


def test_lab():
    lab = ImageCms.profileToProfile(squares(), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB")
    decoded = decode(encoded(lab, "TIFF"))
    assert np.abs(np.asarray(decoded.rgb, dtype=float) - np.asarray(squares(), dtype=float)).mean() < 3  # 8 bits of a and b


def code_points(primaries: int, transfer: int) -> bytes:
    return with_chunk(encoded(squares(), icc_profile=SRGB), b"cICP", bytes((primaries, transfer, 0, 1)))


def test_png_code_points_come_before_a_profile():
    assert distance(decode(code_points(12, 13)), shown(squares(), WIDE["Display P3"])) <= 2
    assert decode(code_points(1, 13)).revision == ""
    assert decode(code_points(200, 13)).revision == ""


def test_hdr_white_is_white():
    """203 cd/m² in PQ, and 75 % in HLG, are the white of SDR (ITU-R BT.2408)."""
    for transfer, level in ((16, 148), (18, 191)):
        content = with_chunk(encoded(Image.new("RGB", (8, 8), (level,) * 3)), b"cICP", bytes((9, transfer, 0, 1)))
        assert min(decode(content).rgb.getpixel((0, 0))) >= 252


def chromaticities(*values: float) -> bytes:
    return struct.pack(f">{len(values)}I", *(round(value * 100000) for value in values))


SRGB_CHROMATICITIES = chromaticities(0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
P3_CHROMATICITIES = chromaticities(0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06)


def test_png_gamma_and_chromaticities():
    gamma = struct.pack(">I", 45455)
    same = np.asarray(squares(), dtype=float)
    assert distance(decode(with_chunk(encoded(squares()), b"gAMA", gamma)), same) == 0
    assert distance(decode(with_chunk(with_chunk(encoded(squares()), b"gAMA", gamma), b"cHRM", SRGB_CHROMATICITIES)), same) == 0
    wide = with_chunk(with_chunk(encoded(squares()), b"gAMA", gamma), b"cHRM", P3_CHROMATICITIES)
    assert distance(decode(wide), shown(squares(), rgb_profile(P3, gamma_curve(2.2)))) <= 2
    assert distance(decode(with_chunk(wide, b"sRGB", b"\1")), same) == 0
    linear = decode(with_chunk(encoded(squares("L")), b"gAMA", struct.pack(">I", 100000)))
    assert distance(linear, shown(squares("L"), grey_profile(1.0))) <= 1


@pytest.mark.parametrize(
    "chunk",
    [
        (b"gAMA", bytes(4)),
        (b"gAMA", b"\xff" * 4),
        (b"cHRM", bytes(32)),
        (b"cHRM", b"\xff" * 32),
        (b"cHRM", chromaticities(0.3127, 0.329, *[0.3, 0.3] * 3)),
        # On a line with white: whether the matrix is singular depends on the processor's rounding.
        (b"cHRM", chromaticities(0.51527, 0.39174, 0.66378, 0.48889, 0.41627, 0.32697, 0.16875, 0.16506)),
        (b"cHRM", chromaticities(0.3127, 0.329, 5000, 3000, 0.3, 0.6, 0.15, 0.06)),
    ],
)
def test_gamma_and_chromaticities_that_make_no_sense_are_ignored(chunk):
    assert distance(decode(with_chunk(encoded(squares()), *chunk)), np.asarray(squares(), dtype=float)) == 0


def test_code_points_of_avif_and_heic(heif_writer):
    """Pillow writes sRGB's: P3's are put in their place."""
    image = Image.new("RGB", (64, 64), (40, 200, 60))
    for image_format in ("AVIF", "HEIF"):
        content = encoded(image, image_format, quality=100)
        assert content.count(b"colrnclx\0\1\0\x0d") == 1
        assert decode(content).revision == ""
        wide = decode(content.replace(b"colrnclx\0\1\0\x0d", b"colrnclx\0\x0c\0\x0d"))
        assert distance(wide, shown(numbers_in(content), WIDE["Display P3"])) <= 1


def test_cameras_mark_adobe_rgb_in_exif_alone():
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA001] = 0xFFFF
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    image = Image.new("RGB", (64, 64), (40, 200, 60))
    assert distance(decode(encoded(image, "JPEG", quality=100, exif=exif)), shown(image, WIDE["Adobe RGB"])) <= 4
    exif.get_ifd(0x8769)[0xA005] = {1: "R98"}
    assert decode(encoded(image, "JPEG", quality=100, exif=exif)).revision == ""


def test_a_cicp_chunk_that_is_too_short_is_ignored(tmp_path):
    path = tmp_path / "a.png"
    pixels = np.full((8, 8, 3), (200, 100, 50), np.uint8)
    Image.fromarray(pixels).save(path)
    content = path.read_bytes()
    kind = b"cICP" + b"\1"
    chunk = len(kind[4:]).to_bytes(4, "big") + kind + zlib.crc32(kind).to_bytes(4, "big")
    path.write_bytes(content[:33] + chunk + content[33:])
    assert np.array_equal(np.asarray(decode(path.read_bytes()).rgb), pixels)
