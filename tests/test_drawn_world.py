"""The drawn people of the benchmarks: what is drawn is what the tags and traits say."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.world.drawing import draw
from benchmarks.world.people import (
    ALL_TAGS,
    FRAMINGS,
    SHOWN_FROM,
    SIMPLE,
    SIMPLE_TRAITS,
    TRAITS,
    Identity,
    identity_vector,
    random_identity,
    random_shot,
    simple_identity,
    simple_shot,
    tags,
    visible_traits,
)


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


@pytest.mark.parametrize("framing", FRAMINGS)
def test_traits_that_count_as_visible_can_be_seen(generator, framing):
    shot = replace(portrait(generator), framing=framing, clothes="dress")
    for trait, is_visible in zip(TRAITS, visible_traits(tags(random_identity(generator), shot)), strict=True):
        low, high = ([value if name == trait else 0.5 for name in TRAITS] for value in (0.1, 0.9))
        if is_visible:
            difference = np.abs(pixels(Identity(tuple(low)), shot, 128) - pixels(Identity(tuple(high)), shot, 128))
            assert difference.max() > 20, trait


def test_the_lengths_of_hair_differ_in_every_framing(generator):
    for framing in FRAMINGS:
        shot = replace(portrait(generator), framing=framing)
        lengths = [[0.5] * len(TRAITS) for _ in range(3)]
        for traits, length in zip(lengths, (0.28, 0.5, 0.72), strict=True):
            traits[TRAITS.index("hair_length")] = length
        short, medium, long = (pixels(Identity(tuple(traits)), shot, 128) for traits in lengths)
        assert np.abs(short - medium).max() > 20
        assert np.abs(medium - long).max() > 20


def test_the_numbers_of_random_people_have_mean_0_and_variance_1(generator):
    people = np.stack([identity_vector(random_identity(generator)) for _ in range(2000)])
    assert people.shape == (2000, len(TRAITS))
    assert np.abs(people.mean(0)).max() < 0.1
    assert np.abs(people.var(0) - 1).max() < 0.1


def test_simple_shots_differ_only_in_what_is_simple(generator):
    shots = [simple_shot(generator) for _ in range(50)]
    for part, values in SIMPLE.items():
        assert {getattr(shot, part) for shot in shots} == set(values)
    assert {shot.tilt for shot in shots} == {0.0}
    assert simple_shot(generator, background="city", tilt=3.0).background == "city"


def test_simple_people_differ_only_in_simple_traits(generator):
    people = np.array([simple_identity(generator).traits for _ in range(50)])
    differing = {trait for trait, spread in zip(TRAITS, np.ptp(people, axis=0), strict=True) if spread > 0.8}
    assert differing == set(SIMPLE_TRAITS)
    assert set(people[:, [trait not in SIMPLE_TRAITS for trait in TRAITS]].ravel()) == {0.5}


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
