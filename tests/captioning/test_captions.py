"""Probabilities become words, and a trigger word stands first and once."""

import numpy as np
import pytest

from captioning.captions import CHARACTER, GENERAL, KAOMOJI, RATING, Tag, TagChoice, caption_text, spoken, with_trigger

TAGS = [
    Tag("general", RATING),
    Tag("1girl", GENERAL),
    Tag("brown_hair", GENERAL),
    Tag(">_<", GENERAL),
    Tag("hatsune_miku", CHARACTER),
    Tag("some_artist", 1),
    Tag("smile", GENERAL),
]


def words(probabilities, exclude=(), threshold=0.35, character=0.85):
    return TagChoice(TAGS, threshold, character, exclude).words(np.array(probabilities, np.float32))


def test_each_category_has_its_threshold_and_ratings_are_never_written():
    assert words([1, 0.36, 0.34, 0, 0.84, 1, 0]) == ["1girl"]
    assert words([1, 0.36, 0.34, 0, 0.86, 1, 0]) == ["hatsune miku", "1girl"]


def test_a_tag_is_kept_from_the_threshold_on():
    assert words([0, 0.35, 0, 0, 0.85, 0, 0]) == ["hatsune miku", "1girl"]


def test_the_surest_tag_comes_first_and_equals_keep_the_order_of_the_tagger():
    assert words([0, 0.5, 0.9, 0.5, 0, 0, 0.5]) == ["brown hair", "1girl", ">_<", "smile"]


def test_underscores_become_spaces_except_in_faces():
    assert spoken("brown_hair") == "brown hair"
    assert spoken("artoria_pendragon_(fate)") == "artoria pendragon (fate)"
    assert all(spoken(face) == face for face in KAOMOJI)
    assert len(KAOMOJI) == 19


@pytest.mark.parametrize("excluded", ["brown_hair", "brown hair", "Brown Hair"])
def test_excluded_tags_match_in_every_spelling(excluded):
    assert words([0, 1, 0.9, 0.8, 0, 0, 0], exclude=(excluded, ">_<")) == ["1girl"]


def test_trigger_is_first_and_once():
    assert caption_text("nyafyi_woman", ["1girl", "smile"]) == "nyafyi_woman, 1girl, smile"
    assert caption_text("smile", ["1girl", "smile"]) == "smile, 1girl"
    assert caption_text("hatsune_miku", ["hatsune miku", "1girl"]) == "hatsune_miku, 1girl"
    assert caption_text("nyafyi_woman", []) == "nyafyi_woman"


@pytest.mark.parametrize(
    ("text", "merged"),
    [
        ("a cat on a roof", "sks, a cat on a roof"),
        ("sks", "sks"),
        ("sks, 1girl", "sks, 1girl"),
        ("1girl, sks, smile\n", "1girl, sks, smile\n"),
        ("a photo of sks smiling", "a photo of sks smiling"),
        ("A photo of SKS.", "A photo of SKS."),
        ("the sks's dog", "the sks's dog"),
        ("asks, tasks", "sks, asks, tasks"),
        ("sks_woman", "sks, sks_woman"),
        ("", "sks\n"),
        (" \n", "sks\n"),
        ("one\r\ntwo\r\n", "sks, one\r\ntwo\r\n"),
    ],
)
def test_a_caption_keeps_its_text_and_gains_a_missing_trigger(text, merged):
    assert with_trigger(text, "sks") == merged
    assert with_trigger(merged, "sks") == merged


@pytest.mark.parametrize(
    ("text", "merged"),
    [
        ("old, 1girl", "new, 1girl"),
        ("old", "new\n"),
        ("old, a photo of new smiling", "a photo of new smiling"),
        ("1girl, old", "new, 1girl, old"),
        ("new, old, 1girl", "new, old, 1girl"),
    ],
)
def test_a_trigger_that_we_wrote_in_front_is_replaced(text, merged):
    assert with_trigger(text, "new", earlier=("old", "older")) == merged


def test_a_trigger_of_the_users_own_is_not_replaced():
    assert with_trigger("old, 1girl", "new", earlier=()) == "new, old, 1girl"


def test_a_trigger_of_several_words_is_found_across_any_space():
    assert with_trigger("a photo of my  cat", "my cat") == "a photo of my  cat"
    assert with_trigger("my catalogue", "my cat") == "my cat, my catalogue"
