"""Each image at several resolutions, and its mirror image: what is encoded, and what each sample of a run sees."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import ImageOps

from training.callbacks.validation import Validator
from training.config import TrainSettings
from training.data.batches import BatchReader, is_mirrored
from training.data.buckets import assign_bucket
from training.data.cache import CacheBuilder, image_pixels
from training.data.cache_files import read_cached_mask, read_latents
from training.data.examples import read_examples
from training.models.base_model import find_base
from training.models.sdxl import Schedule
from training.plan import make_plan, placements_of


def settings_of(resolution: int | tuple[int, ...], **changes) -> TrainSettings:
    plain = TrainSettings()
    data = {"resolution": resolution, "bucket_step": 8, "bucket_max_side": 512, "dataloader_num_workers": 1}
    run = replace(plain.run, train_batch_size=2, num_train_epochs=4)
    return replace(plain, data=replace(plain.data, **data | changes), run=run)


def cached(stage, images, settings: TrainSettings) -> list:
    base, folders = find_base(str(stage.base), stage.models), (stage.base.parent, stage.output / "cache")
    builder = CacheBuilder(base, *folders, torch.device("cpu"), torch.float32)
    return builder.build(list(images), settings.data, seed=0)[0]


@pytest.fixture
def examples(stage):
    """A square image, and a wide one that is shown three times per epoch."""
    stage.add("astronaut", "astronaut.png", "sks, woman")
    stage.add("coffee", "3_cups/coffee.png", "sks, cup")
    return read_examples(stage.images, workers=0, trigger="sks")[0]


def test_an_epoch_is_every_image_at_every_resolution(examples):
    plan = make_plan(examples, settings_of((128, 96)), Schedule())
    assert [image.name for image in plan.images] == ["3_cups/coffee.png", "astronaut.png"]
    seen = Counter((plan.examples[index].name, plan.placements[index].bucket) for step in plan.order for index in step.examples)
    expected = {(example.name, _bucket(example, size)): 4 * example.repeats for example in examples for size in (128, 96)}
    assert seen == expected
    assert "2 images (4 with each resolution) in 4 bucket(s): " in plan.announcement()
    assert f"{4 * 2 * (3 + 1)} training samples" in plan.announcement()


def _bucket(example, resolution: int):
    return assign_bucket(example.width, example.height, resolution, step=8, max_side=512).bucket


def test_batches_never_mix_shapes(examples):
    plan = make_plan(examples, settings_of((128, 96, 64)), Schedule())
    for step in plan.order:
        assert {plan.placements[index].bucket for index in step.examples} == {step.bucket}


def test_buckets_and_time_ids_are_those_of_runs_with_one_resolution(examples):
    """The order of the list decides nothing. Time ids, height first: original size, crop, size of the bucket."""
    plan = make_plan(examples, settings_of((96, 128, 96)), Schedule())
    single = {size: make_plan(examples, settings_of(size), Schedule()) for size in (128, 96)}
    for example, placement in zip(plan.examples, plan.placements, strict=True):
        (size,) = example.resolutions
        (expected,) = (p for e, p in zip(single[size].examples, single[size].placements, strict=True) if e.path == example.path)
        assert placement == expected
        top, left = ((whole - part) // 2 for whole, part in _sizes(placement))
        bucket = placement.bucket
        assert placement.add_time_ids == (example.height, example.width, top, left, bucket.height, bucket.width)
        assert bucket.width * bucket.height <= size**2
    assert make_plan(examples, settings_of((128, 96)), Schedule()).order == plan.order


def _sizes(placement) -> list[tuple[int, int]]:
    return [(placement.resized_height, placement.bucket.height), (placement.resized_width, placement.bucket.width)]


def test_an_image_may_have_resolutions_of_its_own(examples):
    wide, square = examples
    plan = make_plan([replace(wide, resolutions=(64, 32)), square], settings_of(128), Schedule())
    assert [(example.name, example.resolutions) for example in plan.examples] == [
        ("3_cups/coffee.png", (64,)),
        ("3_cups/coffee.png", (32,)),
        ("astronaut.png", (128,)),
    ]


def test_held_out_images_are_counted_once(examples):
    settings = settings_of((128, 96))
    settings = replace(settings, validation=replace(settings.validation, validation_fraction=0.5))
    plan = make_plan(examples, settings, Schedule())
    assert (len(plan.images), len(plan.held_out), plan.validation_fraction) == (1, 2, 0.5)
    assert f"held out for validation: {plan.held_out[0].name}\n" in plan.announcement() + "\n"


def test_each_resolution_is_encoded_and_captions_once(stage, examples):
    plan = make_plan(examples, settings_of((128, 96)), Schedule())
    built = cached(stage, zip(plan.examples, plan.placements, strict=True), settings_of((128, 96)))
    assert [read_latents(each.latents)[0].shape[1:] for each in built] == [
        (place.bucket.height // 8, place.bucket.width // 8) for place in plan.placements
    ]
    assert len({each.latents for each in built}) == 4
    assert len({each.text for each in built}) == 2
    alone = cached(stage, zip(plan.examples[:1], plan.placements[:1], strict=True), settings_of(128))
    assert alone[0].latents == built[0].latents  # a run with one resolution uses the same file


@pytest.fixture
def mirrored(stage):
    """The cached image of an odd size, with a mask, and its plan; FLIP=true."""
    size = (301, 411)
    image = ImageOps.fit(stage.photographs["coffee"], size)
    image.save(stage.images / "a.png")
    image.convert("L").save(stage.images / "a-masklabel.png")
    (stage.images / "a.txt").write_text("sks, cup")
    settings = settings_of(128, flip=True)
    plan = make_plan(read_examples(stage.images, workers=0, trigger="sks")[0], settings, Schedule())
    return cached(stage, zip(plan.examples, plan.placements, strict=True), settings)[0], plan


def test_latents_and_mask_of_the_mirror_image_are_those_of_a_mirrored_file(stage, mirrored):
    example, plan = mirrored
    for name in ("a.png", "a-masklabel.png"):
        with ImageOps.mirror(ImageOps.fit(stage.photographs["coffee"], (301, 411))) as image:
            (image.convert("L") if "mask" in name else image).save(stage.images / name)
    settings = settings_of(128)
    (by_hand,) = read_examples(stage.images, workers=0, trigger="sks")[0]
    (expected,) = cached(stage, [(by_hand, plan.placements[0])], settings)
    for ours, theirs in zip(read_latents(example.mirrored.latents), read_latents(expected.latents), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(read_cached_mask(example.mirrored.mask), read_cached_mask(expected.mask))
    assert example.mirrored.placement == example.placement  # the crop is central: the time ids are right for both
    assert (example.mirrored.text, example.mirrored.variants) == (example.text, example.variants)
    flipped = read_latents(example.latents)[0].flip(-1)
    assert not torch.equal(read_latents(example.mirrored.latents)[0], flipped)  # the VAE is not symmetric


def test_mirrored_pixels_are_the_pixels_in_reverse(stage, examples):
    (square,) = (example for example in examples if example.name == "astronaut.png")
    square = replace(square, resolutions=(128,))
    (placement,) = placements_of([square], settings_of(128).data)
    pixels, mirror = (image_pixels(replace(square, is_mirrored=side), placement) for side in (False, True))
    assert np.abs((mirror.flip(-1) - pixels).numpy()).max() <= 1 / 127.5 + 1e-6


def test_half_of_the_samples_are_mirrored_and_the_position_decides_which(mirrored):
    example, _ = mirrored
    reader = BatchReader([example], 5, 0.0, 1, 1, timesteps=1000, pin=False, masks=True)
    plain, other = (read_latents(each.latents)[0] for each in (example, example.mirrored))
    sides = []
    for position in range(100):
        sample = reader.sample(example, position)
        sides.append(torch.equal(sample["mean"], other))
        assert sides[-1] or torch.equal(sample["mean"], plain)
        mask = read_cached_mask((example.mirrored if sides[-1] else example).mask).clamp(min=0.1)
        assert torch.equal(sample["mask"], mask)
        without = reader.sample(replace(example, mirrored=None), position)
        assert all(torch.equal(sample[name], without[name]) for name in ("noise", "timesteps", "latent_noise", "add_time_ids"))
    assert sides == [is_mirrored(5, position) for position in range(100)]
    assert 35 <= sum(sides) <= 65
    assert 4700 <= sum(is_mirrored(5, position) for position in range(10000)) <= 5300
    assert sides != [is_mirrored(6, position) for position in range(100)]


def test_validation_never_sees_the_mirror_image(mirrored):
    example, _ = mirrored
    reader = BatchReader([example], 5, 0.0, 1, 1, timesteps=1000, pin=False, masks=True)
    plain = read_latents(example.latents)[0]
    batches = list(Validator(reader, lambda batches: 0.0).batches())
    assert len(batches) == 8
    assert all(torch.equal(batch.mean[0], plain) for batch in batches)
