"""Every kind of odd image, file and folder among the images gets a caption, or one line that says what is wrong."""

import os
import shutil

import numpy as np
import pillow_heif
import pytest
from PIL import Image


@pytest.fixture
def image(photographs) -> Image.Image:
    return photographs["coffee"].resize((320, 240))


def write_cmyk(image, path):
    image.convert("CMYK").save(path, "JPEG")


def write_sixteen_bit(image, path):
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path, "PNG")


def write_palette(image, path):
    image.quantize(64).save(path, "PNG", transparency=0)


def write_grey(image, path):
    image.convert("L").save(path, "PNG")


def write_grey_with_alpha(image, path):
    image.convert("LA").save(path, "PNG")


def write_black_and_white(image, path):
    image.convert("1").save(path, "PNG")


def write_mislabelled(image, path):
    image.save(path, "WEBP")


def write_animated(image, path):
    image.save(path, "WEBP", save_all=True, append_images=[image.rotate(90)], duration=100)


def write_animated_png(image, path):
    image.save(path, "PNG", save_all=True, append_images=[image.rotate(90)])


def write_tiny(image, path):
    image.resize((1, 1)).save(path, "PNG")


def write_long(image, path):
    image.resize((2000, 3)).save(path, "PNG")


def write_senseless_exif(image, path):
    """An orientation that would be written back, and beside it a number of numbers that is none."""
    exif = "4d4d002a0000000800030100000200000006000000320112000300000001000600008769000400000001000000380000000068656c6c"
    image.save(
        path, "PNG", exif=b"Exif\0\0" + bytes.fromhex(exif + "030000019003000200000005" + "0000004a0000000032303230" + "0000")
    )


USABLE = [
    write_cmyk,
    write_sixteen_bit,
    write_palette,
    write_grey,
    write_grey_with_alpha,
    write_black_and_white,
    write_mislabelled,
    write_animated,
    write_animated_png,
    write_tiny,
    write_long,
    write_senseless_exif,
]


@pytest.mark.parametrize("write", USABLE, ids=lambda write: write.__name__.removeprefix("write_"))
def test_odd_images_that_can_be_used_get_a_caption(stage, image, write):
    write(image, stage.images / "a.png")
    ended = stage.run(RESOLUTION=64, BUCKET_STEP=64)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert stage.captions()["a.txt"].startswith("nyafyi_woman")
    assert ("animated" in ended.stdout) == write.__name__.startswith("write_animated")


def write_cut_off(image, path):
    image.save(path, "PNG")
    path.write_bytes(path.read_bytes()[:9000])


def write_damaged(image, path):
    image.save(path, "PNG")
    whole = bytearray(path.read_bytes())
    whole[5000:5400] = bytes(400)
    path.write_bytes(whole)


def write_text(image, path):
    path.write_text("I am an image, honestly.")


def write_nothing(image, path):
    path.write_bytes(b"")


def write_bomb(image, path):
    Image.new("1", (10_000, 10_000)).save(path, "PNG")


def write_endless(image, path):
    Image.new("1", (300, 60_000)).save(path, "PNG")


def write_gif(image, path):
    image.save(path, "GIF")


UNUSABLE = {
    write_cut_off: "cannot be decoded: ",
    write_damaged: "cannot be decoded: ",
    write_text: "is not a PNG, JPEG, WebP, BMP, TIFF, HEIC or AVIF image",
    write_nothing: "is empty",
    write_bomb: "has more than 89,478,485 pixels",
    write_endless: "is longer than 16,384 pixels",
    write_gif: "is a GIF, which is not read (save it as PNG or JPEG)",
}


@pytest.mark.parametrize(("write", "message"), UNUSABLE.items(), ids=lambda of: getattr(of, "__name__", "").removeprefix("write_"))
def test_images_that_cannot_be_used_are_one_line_and_the_others_are_done(stage, image, write, message):
    write(image, stage.images / "a.png")
    image.save(stage.images / "b.png")
    for _ in range(2):
        ended = stage.run(RESOLUTION=64, BUCKET_STEP=64)
        assert ended.returncode == 1
        first, *others = ended.stderr.splitlines()
        assert f"a.png: {message}" in first
        assert first.endswith("; replace or remove it")
        assert len(others) == 1  # the counts
        assert list(stage.captions()) == ["b.txt"]
    assert "unreadable                    1  a.png (" in ended.stdout


def test_without_usable_images_no_model_is_needed(stage, image):
    write_text(image, stage.images / "a.png")
    ended = stage.run(CAPTION_MODEL="someone/absent")
    assert ended.returncode == 1
    assert "0 captioned" in ended.stderr


def write_unread(stage, image):
    """What cameras, phones, browsers and image editors leave in a folder, and is not read."""
    image.save(stage.images / "moving.gif")
    for name in ("layers.PSD", "DSC_1.NEF", "drawing.svg", "new.jxl", "live.MOV"):
        (stage.images / name).write_bytes(b"12345678")
    (stage.images / "moving.txt").write_text("my words")
    image.save(stage.images / "download", "JPEG")


UNREAD = (
    "DSC_1.NEF (a camera's raw file; save it as PNG or JPEG to use it), "
    "download (contains a JPEG image; give it the suffix .jpg to use it), drawing.svg (an SVG drawing; save it as PNG or JPEG to "
    "use it), layers.PSD (a Photoshop document; save it as PNG or JPEG to use it), live.MOV (a video; save it as PNG or JPEG to "
    "use it)"
)


def test_phone_photos_and_scans_are_images(stage, image):
    """Case and suffix as phones, browsers and scanners write them."""
    pillow_heif.register_heif_opener()
    formats = {"IMG_1.HEIC": "HEIF", "b.avif": "AVIF", "c.tiff": "TIFF", "d.TIF": "TIFF", "e.jfif": "JPEG", "F.JPE": "JPEG"}
    for angle, (name, image_format) in enumerate(formats.items()):
        image.rotate(40 * angle).save(stage.images / name, image_format)
    (stage.images / "e.txt").write_text("nyafyi_woman, my words")
    ended = stage.run(RESOLUTION=64, BUCKET_STEP=64)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "image check: no flaws found in 6 images" in ended.stdout
    names = "F.JPE, IMG_1.HEIC, b.avif, c.tiff, d.TIF and 1 more"
    assert f"6 images in formats that version 1.0 ignored: {names}\n" in ended.stdout
    assert sorted(stage.captions()) == ["F.txt", "IMG_1.txt", "b.txt", "c.txt", "d.txt", "e.txt"]


def test_formats_that_are_not_read_are_named_with_a_remedy(stage, image):
    write_unread(stage, image)
    none = stage.run()
    assert none.returncode == 3
    assert none.stderr.endswith(f"or run the collect stage first; not used: {UNREAD} and 2 more\n")
    image.save(stage.images / "a.png")
    ended = stage.run(RESOLUTION=64, BUCKET_STEP=64)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert f"  ignored                       7  {UNREAD} and 2 more\n" in ended.stdout
    assert "caption without an image" not in ended.stdout


def test_originals_beside_converted_images_are_not_used(stage, image):
    """A data set of version 1.0 with its HEIC, TIFF or AVIF originals stays what it was."""
    image.save(stage.images / "a.jpg")
    image.save(stage.images / "a.tif")
    ended = stage.run(RESOLUTION=64, BUCKET_STEP=64)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "1 images in " in ended.stdout
    assert "a.tif (has the stem of another image, which is used)" in ended.stdout


def test_folders_and_links_among_the_images(stage, image, tmp_path):
    image.save(tmp_path / "elsewhere.png")
    (stage.images / "link.png").symlink_to(tmp_path / "elsewhere.png")
    (stage.images / "nothing.png").symlink_to(tmp_path / "gone.png")
    (stage.images / "circle.png").symlink_to(stage.images / "circle.png")
    (stage.images / "folder.png").mkdir()
    (stage.images / "notes").mkdir()
    for folder in ("2_face", "faces", "0_excluded", "faces/more", "2_face/deep", "notes/0_excluded"):
        (stage.images / folder).mkdir()
        image.rotate(len(folder) * 10).save(stage.images / folder / "a.png")
    ended = stage.run(RESOLUTION=64, BUCKET_STEP=64)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert list(stage.captions()) == ["2_face/a.txt", "link.txt"]
    line = next(line for line in ended.stdout.splitlines() if line.startswith("  ignored"))
    deeper = "a folder with images; move it into images/ and call it N_name for N repeats to use it"
    assert line.split(maxsplit=2)[1:] == [
        "6",
        f"2_face/deep ({deeper}), circle.png (a link to nothing), faces (a folder with images; call it N_name for N repeats to "
        f"use it), faces/more ({deeper}), folder.png (a folder) and 1 more",
    ]
    assert not (tmp_path / "elsewhere.txt").exists()


def test_caption_that_is_a_link_is_replaced_and_what_it_points_to_is_not(stage, image):
    """Within the data set; a link that leads out of it is refused."""
    image.save(stage.images / "a.png")
    mine = stage.images.parent / "mine.txt"
    mine.write_text("my words")
    (stage.images / "a.txt").symlink_to(mine)
    assert stage.run().returncode == 0
    assert stage.captions() == {"a.txt": "nyafyi_woman, my words"}
    assert mine.read_text() == "my words"


@pytest.mark.parametrize("name", ["猫 и кот", "ภาพถ่าย", "صورة", "é́ (1) [x] #%", "-rf", "a.b.c", "x" * 200])
def test_names_in_any_script(stage, image, name):
    image.save(stage.images / f"{name}.png")
    for _ in range(2):
        ended = stage.run(TRIGGER_WORD="sks")
        assert (ended.returncode, ended.stderr) == (0, "")
    assert list(stage.captions()) == [f"{name}.txt"]
    stage.run("--undo")
    assert stage.captions() == {}


def test_name_that_is_not_utf8(stage, image):
    path = os.fsencode(stage.images) + b"/h\xf6her.png"
    image.save(stage.images / "a.png")
    shutil.move(stage.images / "a.png", path)
    assert stage.run().returncode == 0
    assert os.path.exists(path.replace(b".png", b".txt"))
    assert "nothing to do" in stage.run().stdout
    assert "1 captions restored" in stage.run("--undo").stdout
    assert not os.path.exists(path.replace(b".png", b".txt"))
