"""The settings decide which tags of an image become part of its caption."""

import numpy as np
import pytest

from captioning.captions import CHARACTER, GENERAL, RATING, Tag
from captioning.config import CaptionSettings
from captioning.tag_selection import PUBLISHED_THRESHOLDS, TagSelector, match_tags, mcut, published_threshold, split_replacement
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


def selected(probabilities, pruned=(), **settings):
    selector = TagSelector(TAGS, CaptionSettings(**{f"caption_{name}": value for name, value in settings.items()}))
    return selector.caption_tags(np.array(probabilities, np.float32), pruned)


def test_each_category_has_its_threshold_and_characters_and_ratings_are_off():
    assert selected([1, 0, 0.36, 0.34, 0, 1, 1, 0]) == ["1girl"]
    assert selected([1, 0, 0.36, 0.34, 0, 0.84, 1, 0], character_tags=True) == ["1girl"]
    assert selected([1, 0, 0.36, 0.34, 0, 0.86, 1, 0], character_tags=True) == ["hatsune miku", "1girl"]
    assert selected([1, 0, 0.36, 0.34, 0, 0.5, 1, 0], character_tags=True, character_threshold=0.4) == ["hatsune miku", "1girl"]


def test_a_tag_is_kept_from_the_threshold_on():
    assert selected([0, 0, 0.35, 0, 0, 0.85, 0, 0], character_tags=True) == ["hatsune miku", "1girl"]
    assert selected([0, 0, np.nextafter(np.float32(0.35), 0), 0, 0, 0, 0, 0]) == []


def test_the_most_probable_tag_comes_first_and_equal_ones_keep_the_order_of_the_tagger():
    assert selected([0, 0, 0.5, 0.9, 0.5, 0, 0, 0.5]) == ["brown hair", "1girl", ">_<", "smile"]


def test_the_rating_is_the_most_probable_one_and_follows_the_tags():
    assert selected([0.2, 0.3, 0.9, 0, 0, 0, 0, 0], rating_tags=True, append=("photo",)) == ["1girl", "explicit", "photo"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"append": ("a,b\nc", "", " ,")}, ["1girl", "smile", "a", "b c"]),
        ({"always_first": ("x,\nsmile", "")}, ["smile", "1girl"]),
        ({"replace_tags": ("smile=a\r\tsmile",)}, ["1girl", "a smile"]),
    ],
)
def test_tags_from_the_settings_are_on_one_line(settings, expected):
    assert selected([0, 0, 0.9, 0, 0, 0, 0, 0.8], **settings) == expected


@pytest.mark.parametrize("excluded", ["brown_hair", "brown hair", "Brown Hair", "*hair", "brown*", "*wn_h*"])
def test_excluded_tags_match_in_every_spelling_and_with_wildcards(excluded):
    assert selected([0, 0, 1, 0.9, 0.8, 0, 0, 0], exclude_tags=(excluded, ">_<")) == ["1girl"]


def test_a_star_is_the_only_wildcard():
    names = ["smile", "a.b", "(o) (o)", "[x]"]
    assert match_tags([*names, "* *"], ["*_*"]) == {"* *"}  # a tag of that very name
    assert match_tags(names, ["*_*"]) == {"(o) (o)"}
    assert match_tags(names, ["a?b", "[s]mile", "(o)*"]) == {"(o) (o)"}
    assert match_tags(names, ["*"]) == set(names)


def test_replaced_tags():
    assert selected([0, 0, 1, 0.9, 0.8, 0, 0, 0.7], replace_tags=("1girl=woman", "Brown Hair = auburn hair", ">_<=smile")) == [
        "woman",
        "auburn hair",
        "smile",
    ]
    assert split_replacement("=_==sleepy") == ("=_=", "sleepy")
    assert split_replacement(" a = b c ") == ("a", "b c")


def test_always_first_append_and_max():
    probabilities = [0, 0, 1, 0.9, 0.8, 0, 0, 0.7]
    assert selected(probabilities, always_first=("frown", "smile", "frown too", "Brown_Hair")) == [
        "smile",
        "brown hair",
        "1girl",
        ">_<",
    ]
    assert selected(probabilities, max_tags=2) == ["1girl", "brown hair"]
    assert selected(probabilities, max_tags=2, always_first=("smile",), append=("photo", "1girl")) == ["smile", "1girl", "photo"]
    assert selected([0] * 8, append=("photo",)) == ["photo"]


def test_pruned_tags_do_not_count_towards_the_maximum():
    assert selected([0, 0, 1, 0.9, 0.8, 0, 0, 0.7], pruned={2, 3}, max_tags=2) == [">_<", "smile"]


def test_entries_that_match_no_tag_are_listed():
    settings = CaptionSettings(
        caption_exclude_tags=("smile", "smlie", "*xyz*"), caption_replace_tags=("1gril=woman", "1girl=woman")
    )
    assert TagSelector(TAGS, settings).unknown_entries == ["smlie", "*xyz*", "1gril"]


def test_mcut_cuts_in_the_middle_of_the_widest_gap():
    assert mcut(np.array([0.1, 0.95, 0.3, 0.9], np.float32)) == pytest.approx(0.6)
    assert selected([0, 0, 0.3, 0.28, 0.1, 0, 0, 0.02], threshold="mcut") == ["1girl", "brown hair"]
    assert mcut(np.array([0.4], np.float32)) == 0


def test_mcut_of_characters_is_never_below_015():
    quiet = [0, 0, 0.9, 0, 0, 0.14, 0, 0]
    assert selected(quiet, character_tags=True, character_threshold="mcut") == ["1girl"]
    assert "hatsune miku" in selected([0, 0, 0.9, 0, 0, 0.16, 0, 0], character_tags=True, character_threshold="mcut")


def test_published_thresholds():
    assert published_threshold("SmilingWolf/wd-swinv2-tagger-v3") == 0.2653
    assert published_threshold("/models/wd-eva02-large-tagger-v3/") == 0.5296
    assert published_threshold("deepghs/idolsankaku-eva02-large-tagger-v1") == 0.4985
    assert all(0 < threshold < 1 for threshold in PUBLISHED_THRESHOLDS.values())
    with pytest.raises(SettingsError, match=r"none is known for someone/tagger.*set a number"):
        published_threshold("someone/tagger")
