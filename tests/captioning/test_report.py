"""The table of captions at the end."""

from captioning.report import caption_table
from common.clip_tokens import ClipTokens


def test_tags_by_frequency_without_the_trigger():
    text = caption_table({"a.txt": "sks, hat, hat, smile, 1girl", "b.txt": "sks, smile, x, y"}, ["sks"], 3, None)
    assert text.splitlines()[:4] == [
        "most frequent of the 5 tags in 2 captions:",
        "  smile                              2  100%",
        "  hat                                1   50%",
        "  1girl                              1   50%",
    ]
    assert "fewer than" not in text
    assert "caption lengths are not checked" in text


def test_many_tags_are_counted_and_not_all_shown():
    text = caption_table({"a.txt": ", ".join(f"tag {number}" for number in range(50))}, ["sks"], 3, None)
    assert "  and 30 more" in text


def test_captions_with_few_tags_and_long_ones_are_named(tiny_sdxl):
    captions = {"a.txt": "sks, hat, dog", "b.txt": "sks", "c.txt": "sks, " + ", ".join(["smile"] * 200), "d.txt": "sks, a, b, c"}
    text = caption_table(captions, ["sks"], 1, ClipTokens(tiny_sdxl / "tokenizer"))
    assert "captions with fewer than 3 tags: 2 (a.txt, b.txt)" in text
    assert "captions longer than the 75 tokens that training reads: 1 (c.txt)" in text
    assert "longer" not in caption_table({"d.txt": "sks, a, b, c"}, ["sks"], 1, ClipTokens(tiny_sdxl / "tokenizer"))
