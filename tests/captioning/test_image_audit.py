"""Flaws of real photographs are found, images without flaws are not flagged, and training can skip flagged images."""

import io
import json
import random

import numpy as np
import pytest
from conftest import PHOTOGRAPHS
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from captioning import image_audit
from captioning.image_audit import IndexedImage, audit_images, find_near_duplicates, index_images, write_audit
from captioning.image_stats import ImageStats, measure, measure_blur
from captioning.report import audit_table
from common.dataset_layout import DatasetFolder, find_images
from common.errors import DataError
from common.files import sha256_of
from common.images import BrokenImageError
from training.data.dataset import flagged_images
from training.data.examples import read_examples


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    return DatasetFolder(tmp_path)


def audited(folder, resolution=256):
    images = find_images(folder.images)
    return audit_images(folder, images, index_images(folder, images, workers=2), resolution)


def flaws(folder, resolution=256):
    return {name: sorted(found) for name, found in audited(folder, resolution).flagged.items()}


def test_photographs_without_flaws_are_not_flagged(folder, photographs):
    for name, image in photographs.items():
        image.save(folder.images / f"{name}.png")
    assert flaws(folder) == {}
    assert "no flaws found in 4 images" in audit_table(audited(folder), folder.audit)


@pytest.mark.parametrize(
    ("size", "resolution", "is_small"),
    [
        ((1024, 1024), 1024, False),
        ((640, 1536), 1024, False),
        ((832, 1216), 1024, False),
        ((900, 900), 1024, True),
        ((256, 256), 256, False),
    ],
)
def test_too_small_for_the_training_is_by_area(folder, photographs, size, resolution, is_small):
    photographs["coffee"].resize(size).save(folder.images / "a.png")
    assert flaws(folder, resolution) == ({"a.png": ["too small"]} if is_small else {})


def test_too_small_is_by_the_resolution_of_the_folder(folder, photographs):
    for name, resolution in {"small": 256, "large": [2048, 1024]}.items():
        (folder.images / name).mkdir()
        photographs["coffee"].resize((512, 512)).save(folder.images / name / "a.png")
        (folder.images / name / "folder.toml").write_text(f"resolution = {resolution}")
    photographs["astronaut"].resize((512, 512)).save(folder.images / "b.png")
    audit = audited(folder, resolution=512)
    small = {name: found["too small"] for name, found in audit.flagged.items() if "too small" in found}
    assert small == {"large/a.png": "512x512 px, less than a bucket of 1024x1024 px holds"}
    write_audit(audit, folder)
    assert "large/a.png" in flagged_images(folder, find_images(folder.images), 512)
    (folder.images / "large" / "folder.toml").write_text("resolution = 512")
    with pytest.raises(DataError, match=r"the resolutions in the files folder\.toml have changed .* run the caption stage again"):
        flagged_images(folder, find_images(folder.images), 512)


def test_blurred_images_are_flagged_and_a_blurred_background_is_not(folder, photographs):
    for name, image in photographs.items():
        large = image.resize((512, 512 * image.height // image.width))
        blurred = large.filter(ImageFilter.GaussianBlur(4))
        blurred.save(folder.images / f"{name} blurred.png")
        with_subject = blurred.copy()
        box = (large.width // 3, large.height // 3, large.width * 2 // 3, large.height)
        with_subject.paste(large.crop(box), box)
        with_subject.save(folder.images / f"{name} portrait.png")
    found = flaws(folder)
    assert {name for name, kinds in found.items() if "blurred" in kinds} == {f"{name} blurred.png" for name in photographs}


def test_motion_blur_is_blur(photographs):
    levels = np.asarray(photographs["coffee"].convert("L"), np.float32)
    moved = sum(np.roll(levels, shift, axis=1) for shift in range(12)) / 12
    assert measure_blur(levels) < 0.3
    assert measure_blur(moved) > 0.45
    assert measure_blur(moved.T.copy()) == pytest.approx(measure_blur(moved), abs=0.05)


def test_even_and_tiny_surfaces_are_not_blurred():
    assert measure_blur(np.full((400, 300), 128, np.float32)) == 0
    assert measure_blur(np.zeros((1, 500), np.float32)) == 0


def test_nearly_black_and_nearly_white(folder, photographs):
    photographs["coffee"].point(lambda value: value // 16).save(folder.images / "dark.png")
    photographs["coffee"].point(lambda value: 245 + value // 32).save(folder.images / "white.png")
    Image.new("RGB", (300, 300)).save(folder.images / "black.png")
    photographs["coffee"].point(lambda value: value // 3).save(folder.images / "night.png")
    found = {name: set(kinds) - {"near-duplicate"} for name, kinds in flaws(folder).items()}
    assert {name: kinds for name, kinds in found.items() if kinds} == {
        "dark.png": {"nearly black"},
        "white.png": {"nearly white"},
        "black.png": {"nearly black"},
    }


def test_near_duplicates_are_found_and_the_largest_one_stays(folder, photographs):
    image = photographs["astronaut"]
    image.resize((300, 300)).save(folder.images / "a small.png")
    image.save(folder.images / "b.png")
    image.save(folder.images / "c again.png")
    image.save(folder.images / "d.jpg", quality=40)
    ImageEnhance.Brightness(image).enhance(1.15).save(folder.images / "e bright.webp")
    image.rotate(90).save(folder.images / "f turned.png")
    for name in ("coffee", "chelsea", "rocket"):
        photographs[name].save(folder.images / f"{name}.png")
    audit = audited(folder)
    assert {name: found["near-duplicate"] for name, found in audit.flagged.items()} == dict.fromkeys(
        ("a small.png", "c again.png", "d.jpg", "e bright.webp"), "looks like b.png"
    )


def test_a_duplicate_is_found_among_a_thousand_images(monkeypatch, capsys):
    monkeypatch.setattr("common.progress.LINE_INTERVAL_S", 0)
    draw = random.Random(0)
    stats = {"width": 512, "height": 512, "animated": False, "blur": 0.1, "dark": 0, "bright": 255, "tint": (0, 0), "edges": ""}
    images = [IndexedImage(f"{i}", (), f"{i}", ImageStats(**stats, hash=f"{draw.getrandbits(256):064x}")) for i in range(1000)]
    twin = IndexedImage("twin", (), "twin", ImageStats(**stats, hash=f"{int(images[5].stats.hash, 16) ^ 0xFF:064x}"))
    assert find_near_duplicates([*images, twin]) == {"twin": "5"}
    assert "comparing images: 512/1001 images" in capsys.readouterr().out
    pairs = [IndexedImage(f"{image.name}b", (), "", image.stats) for image in images[::2]]  # of other parts of the comparison
    assert find_near_duplicates([*images, *pairs]) == {pair.name: pair.name[:-1] for pair in pairs}


CORNERS = [(0.0, 0.0), (0.45, 0.45), (0.0, 0.45), (0.45, 0.0), (0.2, 0.2)]


def varied(photographs) -> list[Image.Image]:
    """16 different images: parts of photographs, of which those of a cat, a flame and a red motorcycle have colors of their own."""
    more = photographs | {"motorcycle": Image.open(PHOTOGRAPHS / "motorcycle_left.png").convert("RGB")}
    corners = {name: CORNERS[: 5 if name in ("astronaut", "coffee") else 2] for name in more}
    return [corner(more[name], x, y) for name, of_image in corners.items() for x, y in of_image]


def corner(image, x, y, side=0.55):
    width, height = image.size
    box = (int(width * x), int(height * y), int(width * (x + side)), int(height * (y + side)))
    return image.crop(box).resize((192, 192))


def under(image, *light):
    """The image under a light of this linear RGB."""
    linear = (np.asarray(image, dtype=np.float64) / 255) ** 2.2 * light
    return Image.fromarray((np.clip(linear, 0, 1) ** (1 / 2.2) * 255).astype(np.uint8))


def in_front_of(background, person, x, y):
    """An ellipse of `person` in the lower middle of a background."""
    image, size = background.copy(), (int(110 + 60 * x), int(120 + 60 * y))
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).ellipse((0, 0, *size), fill=255)
    image.paste(person.resize(size), ((192 - size[0]) // 2, 192 - size[1]), mask)
    return image


def common(folder, images):
    for number, image in enumerate(images):
        image.save(folder.images / f"{number:02}.png")
    return audited(folder, 192).common


def test_varied_photographs_have_nothing_in_common(folder, photographs):
    assert common(folder, varied(photographs)) == {}


@pytest.mark.parametrize(
    ("light", "name"),
    [
        ((1.1, 1.0, 0.65), "orange|yellow"),
        ((1.2, 1.0, 0.5), "orange|yellow"),
        ((0.4, 0.9, 1.5), "blue|cyan"),
        ((0.75, 1.15, 0.75), "green|yellowish green"),
        ((1.1, 0.8, 1.1), "magenta|red"),
    ],
)
def test_color_cast_over_most_images_is_reported(folder, photographs, light, name):
    images = varied(photographs)
    found = common(folder, [*(under(image, *light) for image in images[:14]), *images[14:]])
    assert found.keys() == {"color cast"}
    count, what = found["color cast"]
    assert 12 <= count <= 16
    assert what.split(",")[0].removeprefix("tinted ") in name.split("|")
    table = audit_table(audited(folder, 192), folder.audit)
    assert f"color cast                   {count:2}  of 16 images are tinted" in table
    assert "the LoRA would learn this" in table


def test_cast_over_half_of_the_images_and_grey_images_are_not_reported(folder, photographs):
    images = varied(photographs)
    assert common(folder, [*(under(image, 1.2, 1, 0.5) for image in images[:5]), *images[5:10]]) == {}
    assert common(folder, [image.convert("L") for image in images]) == {}
    assert common(folder, [Image.new("RGB", (192, 192), (255, 32 * n, 0)) for n in range(8)] + images[:8]) == {}


def test_same_background_in_most_images_is_reported(folder, photographs):
    images = varied(photographs)
    background = photographs["coffee"].resize((220, 220))
    same = [
        in_front_of(background.crop((x, y, x + 192, y + 192)), person, x / 28, y / 28)
        for person, x, y in zip(images[:10], [0, 4, 8, 12, 16, 0, 4, 8, 12, 16], [0, 8, 4, 0, 8, 12, 16, 12, 4, 16], strict=True)
    ]
    found = common(folder, [*same, *images[10:]])
    assert found.keys() == {"same background"}
    assert 8 <= found["same background"][0] <= 11


def test_plain_backgrounds_of_one_color_are_the_same_and_those_of_different_colors_are_not(folder, photographs):
    people = varied(photographs)[:12]
    colors = [(250, 250, 248), (200, 170, 140), (60, 60, 66), (170, 205, 235), (240, 190, 200), (120, 30, 30)]
    different = [in_front_of(Image.new("RGB", (192, 192), colors[n % 6]), person, 0, 0) for n, person in enumerate(people)]
    assert common(folder, different) == {}
    white = [in_front_of(Image.new("RGB", (192, 192), (235 - n,) * 3), person, 0, 0) for n, person in enumerate(people)]
    assert common(folder, white).keys() == {"same background"}


def test_few_images_are_not_judged_as_a_set(folder, photographs):
    assert common(folder, [under(image, 1.2, 1, 0.5) for image in varied(photographs)[:7]]) == {}


def test_captions_without_an_image(folder, photographs):
    photographs["coffee"].save(folder.images / "a.png")
    for name in ("a.txt", "b.txt", ".hidden.txt"):
        (folder.images / name).write_text("x")
    audit = audited(folder)
    assert audit.captions_without_image == ("b.txt",)
    assert "caption without an image      1  b.txt" in audit_table(audit, folder.audit)


def test_audit_is_written_once_and_names_every_flagged_image(folder, photographs):
    photographs["coffee"].save(folder.images / "a.png")
    (folder.images / "b.png").write_bytes(b"")
    write_audit(audited(folder), folder)
    written, when = json.loads(folder.audit.read_text()), folder.audit.stat().st_mtime_ns
    assert written["flagged"] == {"b.png": {"sha256": sha256_of(folder.images / "b.png"), "flaws": {"unreadable": "is empty"}}}
    assert (written["pictures"], written["resolution"]) == (2, 256)
    write_audit(audited(folder), folder)
    assert folder.audit.stat().st_mtime_ns == when


def test_long_lists_are_cut_in_the_table_only(folder):
    for number in range(7):
        (folder.images / f"{number}.png").write_bytes(b"")
    assert "4.png (is empty) and 2 more" in audit_table(audited(folder), folder.audit)
    assert len(audited(folder).flagged) == 7


def test_only_new_and_changed_images_are_measured(folder, photographs, monkeypatch):
    measured = []
    monkeypatch.setattr(image_audit, "measure", lambda path, *others: measured.append(path.name) or measure(path, *others))
    for name in "abc":
        photographs["coffee"].save(folder.images / f"{name}.png")
    images = find_images(folder.images)
    first = index_images(folder, images, workers=1)
    assert measured == ["a.png", "b.png", "c.png"]
    assert index_images(folder, images, workers=1) == first
    photographs["rocket"].save(folder.images / "b.png")
    (folder.images / "c.png").unlink()
    second = index_images(folder, find_images(folder.images), workers=1)
    assert measured == ["a.png", "b.png", "c.png", "b.png"]
    assert [image.name for image in second.values()] == ["a.png", "b.png"]
    assert second[folder.images / "b.png"].sha256 == sha256_of(folder.images / "b.png")


@pytest.mark.parametrize(
    "damage", [b"", b"[]", b'{"format": 2, "pictures": [{"name": 3}]}', b'{"format": 99, "pictures": []}', b"\xff"]
)
def test_damaged_record_means_that_images_are_measured_again(folder, photographs, damage):
    photographs["coffee"].save(folder.images / "a.png")
    images = find_images(folder.images)
    first = index_images(folder, images, workers=1)
    (folder.records / "pictures.json").write_bytes(damage)
    assert index_images(folder, images, workers=1) == first


def test_file_that_is_not_an_image_is_refused(tmp_path):
    (tmp_path / "a.png").write_text("no")
    with pytest.raises(BrokenImageError, match="is not a PNG, JPEG, WebP, BMP, TIFF, HEIC or AVIF image"):
        measure(tmp_path / "a.png")
    with pytest.raises(BrokenImageError, match="cannot be read: No such file"):
        measure(tmp_path / "b.png")


def test_training_skips_flagged_images_and_no_others(folder, photographs):
    photographs["coffee"].save(folder.images / "a.png")
    photographs["coffee"].resize((270, 180)).save(folder.images / "b.png")
    (folder.images / "c.png").write_bytes(b"")
    for name in "abc":
        (folder.images / f"{name}.txt").write_text("sks")
    write_audit(audited(folder, resolution=256), folder)
    flagged = flagged_images(folder, find_images(folder.images), 256)
    assert flagged == {"b.png": "too small, near-duplicate", "c.png": "unreadable"}
    assert [example.name for example in read_examples(folder.images, 1, flagged)[0]] == ["a.png"]
    photographs["rocket"].save(folder.images / "b.png")  # another image, which the audit has not seen
    assert set(flagged_images(folder, find_images(folder.images), 256)) == {"c.png"}
    assert read_examples(folder.images, 1)[1] == ["c.png: is empty; replace or remove it"]


def test_training_without_anything_left_or_without_an_audit_is_refused(folder):
    (folder.images / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match="run the caption stage first"):
        flagged_images(folder, find_images(folder.images), 256)
    write_audit(audited(folder), folder)
    with pytest.raises(DataError, match="all 1 images are flagged"):
        read_examples(folder.images, 1, flagged_images(folder, find_images(folder.images), 256))
    with pytest.raises(DataError, match="was made for 256 px; run the caption stage again with RESOLUTION=512"):
        flagged_images(folder, find_images(folder.images), 512)
    folder.audit.write_text('{"resolution": 256, "flagged": []}')
    with pytest.raises(DataError, match="missing or damaged"):
        flagged_images(folder, find_images(folder.images), 256)


def test_phone_photo_with_a_second_image_is_not_an_animation(folder, photographs):
    photo = photographs["coffee"]
    photo.save(folder.images / "a.jpg", "MPO", save_all=True, append_images=[photo.resize((60, 40))])
    photo.save(folder.images / "b.webp", save_all=True, append_images=[photo.rotate(90)])
    assert flaws(folder) == {"b.webp": ["animated", "near-duplicate"]}


def test_night_shot_of_sixteen_bits_is_nearly_black(folder):
    levels = np.linspace(0, 255, 300 * 300).reshape(300, 300).astype(np.uint16)
    Image.fromarray(levels).save(folder.images / "a.png")
    assert flaws(folder) == {"a.png": ["nearly black"]}


IMAGE_HASHES = {
    "astronaut": "c2d692764c9f550f3228bd90dfb1c09bcc15b60a7b25b5e29cf34a51b50a67ac",
    "coffee": "bb2483cc209e37f24cf10fc336bc37cf72c29b273240330e60cf9936333c773c",
    "chelsea": "b1ac5ffee6df46225131214897e25edba410e16552ca376ab8c93d465d07426f",
    "rocket": "c0d937671396ec201bdfe521127e67a19c7e0381fc7e0381ec7a1387e4f81b0f",
    "flat": "8000000000000000000000000000000000000000000000000000000000000000",
}
"""Computed with ImageHash 4.3.2, which the first version used: the records that it wrote are still read."""


@pytest.mark.parametrize("name", IMAGE_HASHES)
def test_hash_has_the_bits_of_imagehash(tmp_path, photographs, name):
    image = Image.new("RGB", (300, 200), (40, 40, 40)) if name == "flat" else photographs[name]
    image.save(tmp_path / "a.png")
    assert measure(tmp_path / "a.png").hash == IMAGE_HASHES[name]


def test_hash_is_the_same_for_an_image_in_memory_and_on_disk(tmp_path, photographs):
    """Lossless formats give the same measurements."""
    for suffix in ("png", "bmp"):
        photographs["chelsea"].save(tmp_path / f"a.{suffix}")
    stream = io.BytesIO()
    photographs["chelsea"].save(stream, "WEBP", lossless=True)
    (tmp_path / "a.webp").write_bytes(stream.getvalue())
    assert measure(tmp_path / "a.png") == measure(tmp_path / "a.bmp") == measure(tmp_path / "a.webp")
