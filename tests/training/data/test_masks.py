"""Masks from their files to the batch: cut like their images, cached, weighted; and what is said of those that cannot be used."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps

from common.images import read_mask
from training.config import TrainSettings
from training.data.batches import BatchReader, make_batch
from training.data.buckets import assign_bucket
from training.data.cache import LATENT_PX, CacheBuilder, image_pixels, write_mask
from training.data.cache_files import read_cached_mask
from training.data.examples import Example, read_examples
from training.models.base_model import find_base

SIZES = {"square": (512, 512), "wide": (600, 331), "tall": (257, 601), "exactly a bucket": (256, 64 * 5)}


def placement_of(example):
    return assign_bucket(example.width, example.height, resolution=128, step=8, max_side=256)


def add(stage, name: str, image: Image.Image, mask: Image.Image | None = None, **how) -> None:
    """Save an image with its caption, and its mask as OneTrainer does."""
    image.save(stage.images / name, **how)
    stem = (stage.images / name).with_suffix("")
    stem.with_suffix(".txt").write_text("sks, photo")
    if mask:
        mask.save(f"{stem}-masklabel.png")


def half_mask(size: tuple[int, int]) -> Image.Image:
    """White on the left."""
    mask = Image.new("L", size, "black")
    mask.paste("white", (0, 0, size[0] // 2, size[1]))
    return mask


def the_example(stage, **how) -> Example:
    (example,), problems = read_examples(stage.images, workers=0, **how)
    assert problems == []
    return example


def cached(stage, example: Example, **how) -> torch.Tensor:
    path = stage.output / "cache" / "masks" / "mask.safetensors"
    write_mask(path, example, placement_of(example), **how)
    return read_cached_mask(path)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_a_mask_is_scaled_and_cropped_as_its_image(stage, size):
    """The mask is a copy of the image: each latent of the mask is the mean of the pixels that the VAE sees there."""
    grey = ImageOps.fit(stage.photographs["chelsea"].convert("L"), size)
    add(stage, "grey.png", grey, grey)
    example = the_example(stage)
    pixels = (image_pixels(example, placement_of(example))[:1] + 1) / 2
    blocks = pixels.unfold(1, LATENT_PX, LATENT_PX).unfold(2, LATENT_PX, LATENT_PX)
    assert torch.allclose(cached(stage, example), blocks.mean((-1, -2)), atol=1e-6)


def test_a_mask_is_turned_as_its_image(stage):
    """Both by their own EXIF data: cameras store it in the image, and editors seldom in the mask."""
    upright = ImageOps.fit(stage.photographs["coffee"].convert("L"), (300, 500))
    exif = Image.Exif()
    exif[0x0112] = 6
    add(stage, "turned.png", upright.transpose(Image.Transpose.ROTATE_90), upright, exif=exif)
    example = the_example(stage)
    assert (example.width, example.height) == (300, 500)
    pixels = (image_pixels(example, placement_of(example))[:1] + 1) / 2
    assert torch.allclose(cached(stage, example), torch.nn.functional.avg_pool2d(pixels, LATENT_PX), atol=1e-6)


def test_a_mask_may_have_another_size(stage):
    image = stage.photographs["coffee"]
    add(stage, "a.png", image, half_mask(image.size))
    whole = cached(stage, the_example(stage))
    half_mask(image.size).resize((image.width // 4, image.height // 4)).save(stage.images / "a-masklabel.png")
    assert (cached(stage, the_example(stage)) - whole).abs().max() < 0.6  # only at the edge
    assert (cached(stage, the_example(stage)) - whole).abs().mean() < 0.02


def test_transparency_is_a_mask_on_request(stage):
    image = stage.photographs["coffee"].copy()
    image.putalpha(half_mask(image.size))
    add(stage, "a.png", image)
    assert the_example(stage).mask is None
    example = the_example(stage, alpha_is_mask=True)
    assert example.mask == example.path
    of_alpha = cached(stage, example)
    half_mask(image.size).save(stage.images / "a-masklabel.png")
    assert torch.equal(cached(stage, the_example(stage)), of_alpha)
    Image.new("L", image.size, "white").save(stage.images / "a-masklabel.png")
    assert cached(stage, the_example(stage, alpha_is_mask=True)).min() == 1  # the file comes first


@pytest.fixture
def masked(stage) -> dict[str, Example]:
    """An image with a mask, one whose mask is partly grey, and one without."""
    image = stage.photographs["coffee"]
    grey = half_mask(image.size)
    ImageDraw.Draw(grey).rectangle((0, 0, image.width, image.height // 2), fill=128)
    add(stage, "masked.png", image, half_mask(image.size))
    add(stage, "grey.png", image, grey)
    add(stage, "plain.png", image)
    return {example.path.stem: example for example in read_examples(stage.images, workers=0, trigger="sks")[0]}


def reader_of(stage, examples, **changes) -> BatchReader:
    settings = replace(TrainSettings().data, resolution=128, bucket_step=8, bucket_max_side=256, **changes)
    images = [(example, placement_of(example)) for example in examples]
    base, folders = find_base(str(stage.base), stage.models), (stage.base.parent, stage.output / "cache")
    built, _ = CacheBuilder(base, *folders, torch.device("cpu"), torch.float32).build(images, settings, seed=0)
    masks = any(example.mask for example in built)
    return BatchReader(built, 0, 0.0, len(built), len(built), timesteps=1000, pin=False, masks=masks)


def batch_of(reader: BatchReader):
    return make_batch([reader.sample(each, 0) for each in reader.examples], [1.0] * len(reader.examples), len(reader.examples))


@pytest.mark.parametrize("weight", [0.0, 0.1, 1.0])
def test_what_is_outside_has_the_weight_that_is_set(stage, masked, weight):
    batch = batch_of(reader_of(stage, masked.values(), mask_weight=weight))
    grey, half, plain = (mask[0] for mask in batch.mask)  # by name
    assert batch.mask.shape == (3, 1, *batch.mean.shape[2:])
    assert (plain == 1).all()
    assert (half[:, :8] == 1).all()
    assert half[:, -8:].unique().tolist() == pytest.approx([weight])
    assert grey[:5].unique().tolist() == pytest.approx([max(weight, 128 / 255)])
    assert grey[-5:, -8:].unique().tolist() == pytest.approx([weight])


def test_an_image_may_have_a_weight_of_its_own(stage, masked):
    batch = batch_of(reader_of(stage, [replace(masked["masked"], mask_weight=0.7)]))
    assert batch.mask[..., -8:].unique().tolist() == pytest.approx([0.7])


def test_without_masks_batches_have_none(stage, masked):
    batch = batch_of(reader_of(stage, [masked["plain"]]))
    assert batch.mask.numel() == 0
    assert batch_of(reader_of(stage, masked.values())).mask.numel()


def test_a_changed_mask_is_encoded_again_and_latents_are_not(stage, masked, capsys):
    reader_of(stage, masked.values())
    latents = {path: path.stat().st_mtime_ns for path in (stage.output / "cache" / "latents").iterdir()}
    ImageOps.invert(half_mask(stage.photographs["coffee"].size)).save(stage.images / "masked-masklabel.png")
    changed = read_examples(stage.images, workers=0, trigger="sks")[0]
    reader = reader_of(stage, changed)
    batch = batch_of(reader)
    assert batch.mask[1, 0, :, :8].unique().tolist() == pytest.approx([0.1])
    assert {path: path.stat().st_mtime_ns for path in (stage.output / "cache" / "latents").iterdir()} == latents
    damaged = reader.examples[1].mask
    damaged.write_bytes(damaged.read_bytes()[:-4])
    reader_of(stage, changed)
    assert f"{damaged} is damaged; it is encoded again" in capsys.readouterr().out


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda mask: half_mask((600, 600)).save(mask), "has 600x600 px, another aspect ratio than the image's 600x400; "),
        (lambda mask: half_mask((400, 600)).save(mask), "has 400x600 px, another aspect ratio than the image's 600x400; "),
        (lambda mask: mask.write_bytes(b""), "is empty; "),
        (lambda mask: mask.write_text("text"), "is not a PNG, JPEG, WebP, BMP, TIFF, HEIC or AVIF image; "),
        (cut, "cannot be decoded: "),
        (
            lambda mask: Image.new("L", (600, 400), 0).save(mask),
            "leaves nothing of the image: its brightest level is 0, and white ",
        ),
        (
            lambda mask: Image.new("L", (600, 400), 1).save(mask),
            "leaves nothing of the image: its brightest level is 1, and white ",
        ),
        (
            lambda mask: Image.new("RGBA", (600, 400)).save(mask),
            "leaves nothing of the image: its brightest level is 0, and white ",
        ),
    ],
)
def test_a_mask_that_cannot_be_used_is_named_with_the_remedy(stage, spoil, line):
    stage.add("astronaut")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (400, 600), dtype=np.uint8))
    add(stage, "a.png", stage.photographs["coffee"], noise)
    spoil(stage.images / "a-masklabel.png")
    examples, (problem,) = read_examples(stage.images, workers=1)
    assert [example.name for example in examples] == ["astronaut.png"]
    assert problem.startswith(f"a.png: its mask images/a-masklabel.png {line}")
    assert problem.endswith("; replace or remove it")
    assert "\n" not in problem


def test_two_masks_of_one_image_are_a_mistake(stage):
    stage.add("astronaut")
    image = stage.photographs["coffee"]
    add(stage, "a.png", image, half_mask(image.size))
    (stage.dataset / "masks").mkdir()
    half_mask(image.size).save(stage.dataset / "masks" / "a.png")
    _, problems = read_examples(stage.images, workers=1)
    assert problems == ["a.png: has several masks, images/a-masklabel.png and masks/a.png; remove all but one"]


def test_a_rounded_size_is_the_same_aspect_ratio(stage):
    add(stage, "a.png", stage.photographs["chelsea"], half_mask((226, 150)))  # of 451 x 300
    assert the_example(stage).mask


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("size", [(16601, 599), (599, 16601)])
def test_a_mask_may_have_the_size_of_a_photograph_that_is_scaled_down(stage, size, suffix):
    photograph = stage.photographs["coffee"].resize(size)
    add(stage, "a.jpg", photograph, half_mask(size).convert("1"))
    if suffix == "jpg":
        (stage.images / "a-masklabel.png").unlink()
        half_mask(size).save(stage.images / "a-masklabel.jpg")
    (example,), problems = read_examples(stage.images, workers=1)
    assert problems == []
    assert max(example.width, example.height) == 8301
    mask = np.asarray(read_mask(example.mask, example.path).alpha)
    assert max(mask.shape) == 8301
    assert (mask[:, : mask.shape[1] // 2 - 9].min(), mask[:, mask.shape[1] // 2 + 9 :].max()) == pytest.approx((255, 0), abs=2)


def test_the_weight_that_is_announced_is_that_of_each_folder(stage):
    image = stage.photographs["coffee"]
    for name in ("a.png", "face/b.png"):
        (stage.images / name).parent.mkdir(exist_ok=True)
        add(stage, name, image, half_mask(image.size))
    (stage.images / "face" / "folder.toml").write_text("mask_weight = 0.5")
    line = next(line for line in stage.run("--check").stdout.splitlines() if line.startswith("masks: "))
    assert line == "masks: 2 of 2 images; what is outside a mask has weight 0.1 (images), 0.5 (images/face) in the loss"
