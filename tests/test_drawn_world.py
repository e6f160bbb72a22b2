"""The drawn people of the benchmarks: what is drawn is what the tags and traits say."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.world.drawing import draw
from benchmarks.world.people import ALL_TAGS, SHOWN_FROM, TRAITS, Identity, random_identity, random_shot, tags


def pixels(identity: Identity, shot, size: int = 64) -> np.ndarray:
    return np.asarray(draw(identity, shot, size), dtype=np.float32)


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def portrait(generator):
    shot = random_shot(generator, framing="portrait", light="day", expression="smile", background="grey background")
    return replace(shot, tilt=0.0)


def test_the_same_person_in_the_same_shot_has_the_same_pixels(generator):
    identity, shot = random_identity(generator), random_shot(generator)
    image = draw(identity, shot, 128)
    assert image.size == (128, 128)
    assert image.tobytes() == draw(identity, shot, 128).tobytes()


def test_every_trait_changes_the_image(generator):
    shot = portrait(generator)
    for number, trait in enumerate(TRAITS):
        low, high = ([0.5 if SHOWN_FROM > 0.5 else 0.0] * len(TRAITS) for _ in range(2))
        low[number], high[number] = 0.1, 0.9
        difference = np.abs(pixels(Identity(tuple(low)), shot) - pixels(Identity(tuple(high)), shot))
        assert difference.max() > 20, trait


@pytest.mark.parametrize(
    "change",
    [
        {"clothes": "dress"}, {"colour": "green"}, {"expression": "frown"}, {"pose": "arms up"}, {"background": "forest"},
        {"light": "night"}, {"framing": "upper body"}, {"gaze": "looking to the side"}, {"tilt": 10.0},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_every_part_of_a_shot_changes_the_image(generator, change):
    identity = random_identity(generator)
    shot = replace(portrait(generator), clothes="shirt", colour="red", pose="waving", gaze="looking at viewer")
    assert np.abs(pixels(identity, shot) - pixels(identity, replace(shot, **change))).max() > 20


def test_tags_are_known_and_name_only_what_can_be_seen(generator):
    for _ in range(300):
        identity, shot = random_identity(generator), random_shot(generator)
        found = tags(identity, shot)
        assert set(found) <= set(ALL_TAGS)
        assert len(found) == len(set(found))
        assert shot.framing in found
        assert f"{shot.colour} {shot.clothes}" in found
        if shot.framing == "full body":
            assert not {"freckles", "mole", "glasses", "smile"} & set(found)
    assert "waving" not in tags(identity, replace(shot, framing="portrait", pose="waving"))
    assert "waving" in tags(identity, replace(shot, framing="upper body", pose="waving"))


def test_marks_are_tagged_where_they_are_drawn(generator):
    shot = portrait(generator)
    for mark in ("freckles", "mole", "glasses"):
        without = [0.5] * len(TRAITS)
        shown = [0.9 if trait == mark else value for trait, value in zip(TRAITS, without, strict=True)]
        assert mark in tags(Identity(tuple(shown)), shot)
        assert mark not in tags(Identity(tuple(without)), shot)
