"""Probabilities become the words of a caption as the settings say."""

import numpy as np
import pytest

from captioning.captions import CHARACTER, GENERAL, RATING, Tag
from captioning.config import CaptionSettings
from captioning.tag_selection import KNOWN_POINTS, TagChoice, known_point, matching, mcut, split_replacement
from common.errors import SettingsError

TAGS = [
    Tag("general", RATING),
    Tag("explicit", RATING),
    Tag("1girl", GENERAL),
    Tag("brown_hair", GENERAL),
    Tag(">_<", GENERAL),
    Tag("hatsune_miku", CHARACTER),
    Tag("some_artist", 1),
    Tag("smile", GENERAL),
]


def words(probabilities, pruned=(), **settings):
    choice = TagChoice(TAGS, CaptionSettings(**{f"caption_{name}": value for name, value in settings.items()}))
    return choice.words(np.array(probabilities, np.float32), pruned)


def test_each_category_has_its_threshold_and_characters_and_ratings_are_off():
    assert words([1, 0, 0.36, 0.34, 0, 1, 1, 0]) == ["1girl"]
    assert words([1, 0, 0.36, 0.34, 0, 0.84, 1, 0], character_tags=True) == ["1girl"]
    assert words([1, 0, 0.36, 0.34, 0, 0.86, 1, 0], character_tags=True) == ["hatsune miku", "1girl"]
    assert words([1, 0, 0.36, 0.34, 0, 0.5, 1, 0], character_tags=True, character_threshold=0.4) == ["hatsune miku", "1girl"]


def test_a_tag_is_kept_from_the_threshold_on():
    assert words([0, 0, 0.35, 0, 0, 0.85, 0, 0], character_tags=True) == ["hatsune miku", "1girl"]
    assert words([0, 0, np.nextafter(np.float32(0.35), 0), 0, 0, 0, 0, 0]) == []


def test_the_surest_tag_comes_first_and_equals_keep_the_order_of_the_tagger():
    assert words([0, 0, 0.5, 0.9, 0.5, 0, 0, 0.5]) == ["brown hair", "1girl", ">_<", "smile"]


def test_the_rating_is_the_surest_one_and_stands_behind_the_tags():
    assert words([0.2, 0.3, 0.9, 0, 0, 0, 0, 0], rating_tags=True, append=("photo",)) == ["1girl", "explicit", "photo"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"append": ("a,b\nc", "", " ,")}, ["1girl", "smile", "a", "b c"]),
        ({"always_first": ("x,\nsmile", "")}, ["smile", "1girl"]),
        ({"replace_tags": ("smile=a\r\tsmile",)}, ["1girl", "a smile"]),
    ],
)
def test_words_from_the_settings_are_tags_of_one_line(settings, expected):
    assert words([0, 0, 0.9, 0, 0, 0, 0, 0.8], **settings) == expected


@pytest.mark.parametrize("excluded", ["brown_hair", "brown hair", "Brown Hair", "*hair", "brown*", "*wn_h*"])
def test_excluded_tags_match_in_every_spelling_and_with_wildcards(excluded):
    assert words([0, 0, 1, 0.9, 0.8, 0, 0, 0], exclude_tags=(excluded, ">_<")) == ["1girl"]


def test_wildcards_mean_a_star_and_nothing_else():
    names = ["smile", "a.b", "(o) (o)", "[x]"]
    assert matching([*names, "* *"], ["*_*"]) == {"* *"}  # a tag of that very name
    assert matching(names, ["*_*"]) == {"(o) (o)"}
    assert matching(names, ["a?b", "[s]mile", "(o)*"]) == {"(o) (o)"}
    assert matching(names, ["*"]) == set(names)


def test_replaced_tags():
    assert words([0, 0, 1, 0.9, 0.8, 0, 0, 0.7], replace_tags=("1girl=woman", "Brown Hair = auburn hair", ">_<=smile")) == [
        "woman",
        "auburn hair",
        "smile",
    ]
    assert split_replacement("=_==sleepy") == ("=_=", "sleepy")
    assert split_replacement(" a = b c ") == ("a", "b c")


def test_always_first_append_and_max():
    probabilities = [0, 0, 1, 0.9, 0.8, 0, 0, 0.7]
    assert words(probabilities, always_first=("frown", "smile", "frown too", "Brown_Hair")) == [
        "smile",
        "brown hair",
        "1girl",
        ">_<",
    ]
    assert words(probabilities, max_tags=2) == ["1girl", "brown hair"]
    assert words(probabilities, max_tags=2, always_first=("smile",), append=("photo", "1girl")) == ["smile", "1girl", "photo"]
    assert words([0] * 8, append=("photo",)) == ["photo"]


def test_pruned_tags_are_left_out_before_the_maximum_is_counted():
    assert words([0, 0, 1, 0.9, 0.8, 0, 0, 0.7], pruned={2, 3}, max_tags=2) == [">_<", "smile"]


def test_entries_that_no_tag_answers_to_are_known():
    settings = CaptionSettings(
        caption_exclude_tags=("smile", "smlie", "*xyz*"), caption_replace_tags=("1gril=woman", "1girl=woman")
    )
    assert TagChoice(TAGS, settings).without_effect() == ["smlie", "*xyz*", "1gril"]


def test_mcut_cuts_in_the_middle_of_the_widest_gap():
    assert mcut(np.array([0.1, 0.95, 0.3, 0.9], np.float32)) == pytest.approx(0.6)
    assert words([0, 0, 0.3, 0.28, 0.1, 0, 0, 0.02], threshold="mcut") == ["1girl", "brown hair"]
    assert mcut(np.array([0.4], np.float32)) == 0


def test_mcut_of_characters_is_never_below_015():
    quiet = [0, 0, 0.9, 0, 0, 0.14, 0, 0]
    assert words(quiet, character_tags=True, character_threshold="mcut") == ["1girl"]
    assert "hatsune miku" in words([0, 0, 0.9, 0, 0, 0.16, 0, 0], character_tags=True, character_threshold="mcut")


def test_known_points():
    assert known_point("SmilingWolf/wd-swinv2-tagger-v3") == 0.2653
    assert known_point("/models/wd-eva02-large-tagger-v3/") == 0.5296
    assert known_point("deepghs/idolsankaku-eva02-large-tagger-v1") == 0.4985
    assert all(0 < point < 1 for point in KNOWN_POINTS.values())
    with pytest.raises(SettingsError, match=r"auto knows no point for Somebody/tagger.*set a number"):
        known_point("Somebody/tagger")
