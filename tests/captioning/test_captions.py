"""How captions spell tags, and that they have the trigger word first and once."""

import pytest

from captioning.captions import KAOMOJI, add_trigger, caption_text, split_tags, tag_to_text


def test_underscores_become_spaces_except_in_faces():
    assert tag_to_text("brown_hair") == "brown hair"
    assert tag_to_text("artoria_pendragon_(fate)") == "artoria pendragon (fate)"
    assert all(tag_to_text(face) == face for face in KAOMOJI)
    assert len(KAOMOJI) == 19


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
    assert add_trigger(text, "sks") == merged
    assert add_trigger(merged, "sks") == merged


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
def test_a_trigger_of_an_earlier_run_is_replaced(text, merged):
    assert add_trigger(text, "new", earlier=("old", "older")) == merged


def test_a_trigger_that_the_user_wrote_is_not_replaced():
    assert add_trigger("old, 1girl", "new", earlier=()) == "new, old, 1girl"


def test_a_trigger_of_several_words_is_found_across_any_space():
    assert add_trigger("a photo of my  cat", "my cat") == "a photo of my  cat"
    assert add_trigger("my catalogue", "my cat") == "my cat, my catalogue"


def test_tags_of_a_caption():
    assert split_tags(" sks,1girl ,, a  cat\n,") == ["sks", "1girl", "a cat"]
