"""Buckets, crops and time ids for hand-made sizes; properties that the order of every run has."""

import math
from collections import Counter
from itertools import groupby, pairwise

import pytest

from training.data.buckets import Bucket, assign_bucket, epochs_of, run_order


def assigned(width: int, height: int):
    return assign_bucket(width, height, resolution=1024, step=64, max_side=2048)


@pytest.mark.parametrize(
    ("size", "bucket", "resized", "left_top", "time_ids"),
    [
        # An image taller than its bucket: scaled to the bucket's width, cut above and below. Every pair height first.
        ((1100, 1500), (896, 1152), (896, 1222), (0, 35), (1500, 1100, 35, 0, 1152, 896)),
        # The reverse, an image wider than its bucket: scaled to its height, cut left and right.
        ((940, 1500), (768, 1280), (802, 1280), (17, 0), (1500, 940, 0, 17, 1280, 768)),
        # Both turned by 90 degrees.
        ((1500, 1100), (1152, 896), (1222, 896), (35, 0), (1100, 1500, 0, 35, 896, 1152)),
        ((1500, 940), (1280, 768), (1280, 802), (0, 17), (940, 1500, 17, 0, 768, 1280)),
        # Square, as large and larger.
        ((1024, 1024), (1024, 1024), (1024, 1024), (0, 0), (1024, 1024, 0, 0, 1024, 1024)),
        ((3000, 3000), (1024, 1024), (1024, 1024), (0, 0), (3000, 3000, 0, 0, 1024, 1024)),
        # Smaller than every bucket of full area: never scaled up, and scaled down only to the crop's multiple of 64.
        ((300, 500), (256, 448), (269, 448), (6, 0), (500, 300, 0, 6, 448, 256)),
        ((1000, 1000), (960, 960), (960, 960), (0, 0), (1000, 1000, 0, 0, 960, 960)),
        ((512, 512), (512, 512), (512, 512), (0, 0), (512, 512, 0, 0, 512, 512)),
        ((451, 300), (448, 256), (448, 298), (0, 21), (300, 451, 21, 0, 256, 448)),
        # Longer than the longest bucket.
        ((6000, 1000), (2048, 320), (2048, 341), (0, 10), (1000, 6000, 10, 0, 320, 2048)),
    ],
)
def test_crops_and_time_ids(size, bucket, resized, left_top, time_ids):
    placement = assigned(*size)
    assert placement.bucket == Bucket(*bucket)
    assert (placement.resized_width, placement.resized_height) == resized
    assert (placement.left, placement.top) == left_top
    assert placement.add_time_ids == time_ids


@pytest.mark.parametrize("size", [(800, 1200), (832, 1216), (1000, 1500), (2000, 3000), (1365, 2048)])
def test_portraits_of_two_to_three_keep_their_area(size):
    bucket = assigned(*size).bucket
    assert bucket.width * bucket.height > 0.9 * min(1024**2, size[0] * size[1])
    assert bucket.width / bucket.height == pytest.approx(2 / 3, rel=0.03)


def test_properties_of_every_placement():
    sides = [256, 257, 300, 383, 512, 777, 1023, 1024, 1025, 1499, 2047, 2048, 5000]
    for width, height in [(width, height) for width in sides for height in sides]:
        placement = assigned(width, height)
        bucket = placement.bucket
        assert bucket.width % 64 == bucket.height % 64 == 0
        assert bucket.width * bucket.height <= 1024**2
        assert max(bucket.width, bucket.height) <= 2048
        assert bucket.width <= placement.resized_width <= width
        assert bucket.height <= placement.resized_height <= height
        assert placement.resized_width == bucket.width or placement.resized_height == bucket.height
        assert 0 <= placement.resized_width - bucket.width - 2 * placement.left <= 1
        assert 0 <= placement.resized_height - bucket.height - 2 * placement.top <= 1
        stretch = (placement.resized_width / width) / (placement.resized_height / height)
        assert abs(stretch - 1) < 1 / min(placement.resized_width, placement.resized_height)
        turned = assigned(height, width)
        assert (turned.bucket.width, turned.bucket.height) == (bucket.height, bucket.width)
        assert (turned.left, turned.top) == (placement.top, placement.left)


def test_crop_is_small_if_the_image_is_large_enough():
    for percent in range(25, 401):
        width, height = round(1500 * math.sqrt(percent / 100)), round(1500 / math.sqrt(percent / 100))
        placement = assigned(width, height)
        kept = placement.bucket.width * placement.bucket.height / (placement.resized_width * placement.resized_height)
        assert kept > 0.84


def test_resolution_step_and_longest_side_are_obeyed():
    assert assign_bucket(600, 400, resolution=128, step=64, max_side=128).bucket == Bucket(128, 64)
    assert assign_bucket(600, 400, resolution=128, step=8, max_side=256).bucket == Bucket(152, 104)
    assert assign_bucket(4000, 1000, resolution=1024, step=64, max_side=1024).bucket == Bucket(1024, 256)


SQUARE, WIDE, TALL = Bucket(128, 128), Bucket(192, 64), Bucket(64, 192)
BUCKETS = [SQUARE] * 7 + [WIDE] * 3 + [TALL] * 4
REPEATS = [1, 2, 1, 1, 3, 1, 1, 2, 1, 1, 1, 1, 5, 1]
EPOCHS = 5


def order(**changes):
    arguments = {"buckets": BUCKETS, "repeats": REPEATS, "epochs": EPOCHS, "global_batch": 4, "seed": 0}
    return run_order(**arguments | changes)


@pytest.mark.parametrize("global_batch", [1, 3, 4, 64])
def test_every_image_is_shown_once_per_epoch_and_repeat(global_batch):
    steps = order(global_batch=global_batch)
    shown = Counter(example for step in steps for example in step.examples)
    assert shown == {index: EPOCHS * times for index, times in enumerate(REPEATS)}
    for epochs in range(1, EPOCHS + 1):
        shown = Counter(example for step in steps if step.epoch < epochs for example in step.examples)
        for index, times in enumerate(REPEATS):  # leftovers that did not fill a batch wait for the next epoch
            assert epochs * times - global_batch < shown[index] <= epochs * times


@pytest.mark.parametrize("global_batch", [1, 3, 4, 64])
@pytest.mark.parametrize("steps", [1, 2, 9, 50])
def test_fewest_epochs_with_a_number_of_full_batches(global_batch, steps):
    epochs = epochs_of(BUCKETS, REPEATS, steps, global_batch)
    orders = [order(epochs=each, global_batch=global_batch) for each in (epochs - 1, epochs)]
    full = [sum(len(step.examples) == global_batch for step in each) for each in orders]
    assert full[0] < steps <= full[1]
    first = order(epochs=epochs, global_batch=global_batch)[:steps]
    assert first == order(epochs=epochs + 3, global_batch=global_batch)[:steps]


def test_epochs_are_exact_where_batches_fill_them():
    steps = order(buckets=[SQUARE] * 4 + [WIDE] * 8, repeats=[1] * 8 + [2] * 4, global_batch=4)
    for epoch in range(EPOCHS):
        shown = Counter(example for step in steps if step.epoch == epoch for example in step.examples)
        assert shown == {index: 1 if index < 8 else 2 for index in range(12)}


def test_a_batch_has_one_shape_and_only_the_last_of_a_bucket_is_short():
    steps = order()
    assert [step.number for step in steps] == list(range(len(steps)))
    assert [step.epoch for step in steps] == sorted(step.epoch for step in steps)
    for bucket in (SQUARE, WIDE, TALL):
        mine = [step for step in steps if step.bucket == bucket]
        assert {BUCKETS[example] for step in mine for example in step.examples} == {bucket}
        samples = EPOCHS * sum(times for shape, times in zip(BUCKETS, REPEATS, strict=True) if shape == bucket)
        assert sum(len(step.examples) for step in mine) == samples
        short = [step for step in mine if len(step.examples) < 4]
        assert [len(step.examples) for step in short] == ([samples % 4] if samples % 4 else [])
        assert all(step.epoch == EPOCHS - 1 for step in short)


def test_order_is_shuffled_for_every_epoch_and_by_the_seed():
    steps = order(buckets=[SQUARE] * 12, repeats=[1] * 12, global_batch=1)
    epochs = [[step.examples[0] for step in group] for _, group in groupby(steps, key=lambda step: step.epoch)]
    assert len({tuple(epoch) for epoch in epochs}) == EPOCHS
    assert sorted(epochs[0]) == list(range(12)) != epochs[0]
    assert order(seed=1) != order(seed=2)


def test_buckets_are_mixed_within_an_epoch():
    steps = order(buckets=[SQUARE] * 16 + [WIDE] * 16, repeats=[1] * 32, global_batch=1, epochs=1)
    changes = sum(first.bucket != second.bucket for first, second in pairwise(steps))
    assert changes > 8


def test_order_is_the_same_on_every_machine():
    """It depends on the arguments alone: on SHA-256 and sorting."""
    steps = run_order([SQUARE, WIDE, SQUARE, SQUARE, WIDE], [1, 1, 1, 2, 1], epochs=2, global_batch=2, seed=11)
    assert [(step.epoch, str(step.bucket), step.examples) for step in steps] == [
        (0, "192x64", (1, 4)),
        (0, "128x128", (3, 2)),
        (0, "128x128", (0, 3)),
        (1, "192x64", (4, 1)),
        (1, "128x128", (0, 2)),
        (1, "128x128", (3, 3)),
    ]


def test_a_batch_does_not_depend_on_other_shapes():
    """A bucket's stream does not depend on the images of the others."""
    alone = run_order([SQUARE] * 7, REPEATS[:7], EPOCHS, 4, 0)
    among = [step for step in order() if step.bucket == SQUARE]
    assert sorted(step.examples for step in alone) == sorted(step.examples for step in among)
