"""Which files are masks, of which images, and what they hold: the same for every stage."""

import numpy as np
import pytest
from PIL import Image

from captioning.image_audit import audit_images, index_images
from common.dataset_layout import DatasetFolder, find_images, name_in
from common.images import read_mask
from common.project import SharedDataSettings
from common.unused_entries import unused_entries
from reporting.dataset import read_dataset

GREY = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1)))


@pytest.fixture
def folder(tmp_path) -> DatasetFolder:
    return DatasetFolder(tmp_path / "dataset")


def add(folder: DatasetFolder, *names: str) -> None:
    """Save grey images as `images/...` or `masks/...`."""
    for name in names:
        path = folder.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        GREY.save(path)


def masks_of(folder: DatasetFolder) -> dict[str, list[str]]:
    """Image -> its masks."""
    images = find_images(folder.images)
    return {name_in(folder.images, image.path): [name_in(folder.root, mask) for mask in image.masks] for image in images}


def test_masks_belong_to_the_images_whose_names_they_have(folder):
    add(folder, "images/a.png", "images/a-masklabel.png")  # OneTrainer
    add(folder, "images/b.jpg", "masks/b.png")  # kohya, in a folder of its own
    add(folder, "images/5_face/c.webp", "images/5_face/c-MaskLabel.PNG")
    add(folder, "images/5_face/d.png", "masks/5_face/d.webp")
    add(folder, "images/e.f.png", "images/e.f-masklabel.png")
    add(folder, "images/g.png", "masks/g-masklabel.png")
    add(folder, "images/h.png", "masks/h.jpg", "images/h-masklabel.png")
    add(folder, "images/plain.png")
    assert masks_of(folder) == {
        "5_face/c.webp": ["images/5_face/c-MaskLabel.PNG"],
        "5_face/d.png": ["masks/5_face/d.webp"],
        "a.png": ["images/a-masklabel.png"],
        "b.jpg": ["masks/b.png"],
        "e.f.png": ["images/e.f-masklabel.png"],
        "g.png": ["masks/g-masklabel.png"],
        "h.png": ["images/h-masklabel.png", "masks/h.jpg"],
        "plain.png": [],
    }
    assert unused_entries(folder.images, find_images(folder.images)) == {}


def test_a_mask_is_never_an_image_of_any_stage(folder):
    """Not even one whose image is missing."""
    add(folder, "images/a.png", "images/a-masklabel.png", "images/lost-masklabel.png", "images/a-condlabel.png", "masks/gone.png")
    add(folder, "images/masks/a.png")
    images = find_images(folder.images)
    assert [image.path.name for image in images] == ["a.png"]
    audit = audit_images(folder, images, index_images(folder, images, workers=1), resolution=1024)
    assert audit.images == 1
    assert audit.flagged.keys() == {"a.png"}  # too small
    shown = read_dataset(folder, "sks", SharedDataSettings())
    assert [image.name for image in shown.images] == ["a.png"]
    assert audit.ignored == {
        "a-condlabel.png": "OneTrainer's image for conditioning, which is not used",
        "lost-masklabel.png": "a mask without an image; rename it to NAME-masklabel.png for the image NAME",
        "masks": "a folder with images; if these are masks, move its files to dataset/masks/",
        "masks/gone.png": "a mask without an image; give it the name of an image in images/",
    }


def test_the_report_outlines_masks(folder):
    add(folder, "images/a.png", "images/b.png")
    without = {image.name: image.thumbnail for image in read_dataset(folder, "sks", SharedDataSettings()).images}
    add(folder, "images/a-masklabel.png")
    dataset = read_dataset(folder, "sks", SharedDataSettings())
    shown = {image.name: image.thumbnail for image in dataset.images}
    assert shown["b.png"] == without["b.png"]
    assert shown["a.png"] != without["a.png"]
    assert [image.has_mask for image in dataset.images] == [True, False]


def test_the_report_outlines_transparency_where_it_is_the_mask(folder):
    add(folder, "images/a.png", "images/b.png", "images/b-masklabel.png", "images/c.png")
    half = GREY.convert("RGBA")
    half.paste((0, 0, 0, 0), (0, 0, 32, 64))
    half.save(folder.images / "a.png")
    GREY.convert("RGBA").save(folder.images / "c.png")  # opaque
    white, *shown = (read_dataset(folder, "sks", SharedDataSettings(alpha=alpha)) for alpha in ("white", "mask", "mask"))
    assert [image.has_mask for image in white.images] == [False, True, False]
    for dataset in shown:  # the second from the cache
        assert [image.has_mask for image in dataset.images] == [True, True, False]
        assert dataset.images[0].thumbnail != white.images[0].thumbnail
        assert [image.thumbnail for image in dataset.images[1:]] == [image.thumbnail for image in white.images[1:]]


def test_the_report_shows_the_captions_that_training_reads(folder):
    add(folder, "images/a.png", "images/b.png", "images/c.png")
    (folder.images / "metadata.jsonl").write_text("\n".join(f'{{"file_name": "{n}.png", "text": "listed {n}"}}' for n in "ab"))
    (folder.images / "b.caption").write_text("own, smile\nown, hat\n")
    for per_line, second in ((False, "own, smile, own, hat"), (True, "own, smile\nown, hat")):
        dataset = read_dataset(folder, "sks", SharedDataSettings(caption_per_line=per_line))
        assert [image.caption for image in dataset.images] == ["listed a", second, ""]
        assert dict(dataset.tags) == {"own": 1 + per_line, "smile": 1, "hat": 1, "listed a": 1}


def levels(mask) -> np.ndarray:
    return np.asarray(mask.alpha, dtype=float)


def test_a_mask_is_as_white_as_its_pixels_are_bright_and_opaque(tmp_path):
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    GREY.save(image)
    GREY.save(mask)
    assert (levels(read_mask(mask, image)) == np.asarray(GREY)).all()
    cut_out = Image.new("RGBA", (64, 64), (255, 255, 255, 0))  # white, of which nothing is visible
    cut_out.paste((255, 255, 255, 255), (0, 0, 32, 64))
    cut_out.paste((0, 0, 0, 255), (0, 0, 16, 64))
    cut_out.paste((255, 255, 255, 100), (16, 0, 20, 64))
    cut_out.save(mask)
    assert levels(read_mask(mask, image))[0].tolist() == [0.0] * 16 + [100.0] * 4 + [255.0] * 12 + [0.0] * 32


@pytest.mark.parametrize("mode", ["1", "P", "RGB", "I;16", "LA"])
def test_a_mask_may_be_stored_in_any_way(tmp_path, mode):
    half = Image.new("L", (64, 64))
    half.paste(255, (0, 0, 32, 64))
    stored = Image.fromarray(np.asarray(half).astype(np.uint16) * 257) if mode == "I;16" else half.convert(mode)
    stored.save(tmp_path / "mask.png")
    assert (levels(read_mask(tmp_path / "mask.png", tmp_path / "image.png")) == np.asarray(half)).all()


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff"])
def test_the_transparency_of_an_image_may_be_its_mask(tmp_path, suffix):
    image = tmp_path / f"image.{suffix}"
    color = Image.new("RGB", GREY.size, "red")
    color.putalpha(GREY)
    color.save(image, **({"lossless": True, "exact": True} if suffix == "webp" else {}))
    assert (levels(read_mask(image, image)) == np.asarray(GREY)).all()
    color.convert("RGB").save(image)
    assert read_mask(image, image).alpha is None


def test_a_name_that_is_nothing_but_the_ending_is_a_mask_without_an_image(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a.png", "-masklabel.png"):
        Image.new("RGB", (8, 8)).save(images / name)
    found = find_images(images)
    assert [image.path.name for image in found] == ["a.png"]
    assert [image.masks for image in found] == [()]
