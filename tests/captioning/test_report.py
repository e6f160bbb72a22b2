"""The table of captions at the end, and CLIP's tokens counted without torch."""

import json
import shutil

import pytest

from captioning.report import caption_table
from common.clip_tokens import ClipTokens, find_clip_tokens

TEXTS = [
    "nyafyi_woman, 1girl, brown hair, looking at viewer, >_<, ^_^, white shirt",
    "A photo of SKS, isn't it? 2024 höher 猫 и кот  🐈 <3 ;)",
    "artoria pendragon (fate), k-on!, \u00e9\u0301 e\u0301, don't they're I'll we've I'm he'd",
    "",
    "<|endoftext|> a\tb\nc",
]


@pytest.fixture(scope="module")
def tokenizer(tiny_sdxl):
    return tiny_sdxl / "tokenizer"


def test_tokens_are_those_of_the_training(tokenizer, tmp_path):
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(tokenizer)
    expected = [len(theirs(text, add_special_tokens=False)["input_ids"]) for text in TEXTS]
    assert [ClipTokens(tokenizer).count(text) for text in TEXTS] == expected
    in_one = tmp_path / "whole"
    theirs.save_pretrained(in_one)
    assert (in_one / "tokenizer.json").is_file()
    assert [ClipTokens(in_one).count(text) for text in TEXTS] == expected


def test_vocabulary_of_two_files_is_enough(tokenizer, tmp_path):
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(tokenizer)
    theirs.save_pretrained(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    expected = [len(theirs(text, add_special_tokens=False)["input_ids"]) for text in TEXTS]
    assert [ClipTokens(tmp_path).count(text) for text in TEXTS] == expected


def test_tokenizer_of_the_base_or_of_any_model_is_found(tokenizer, tmp_path):
    assert find_clip_tokens(tmp_path, "base") is None
    shutil.copytree(tokenizer, tmp_path / "other" / "tokenizer")
    (tmp_path / "file.safetensors").write_bytes(b"")
    assert find_clip_tokens(tmp_path, "base").count("a cat") > 0
    assert find_clip_tokens(tmp_path / "none", str(tmp_path / "other")).count("a cat") > 0


def test_tokenizers_of_other_models_and_damaged_ones_are_skipped(tokenizer, tmp_path):
    for name, content in {"llm": '{"model": {"vocab": {"a": 0}}}', "half": '{"model"', "list": "[1]"}.items():
        (tmp_path / name / "tokenizer").mkdir(parents=True)
        (tmp_path / name / "tokenizer" / "tokenizer.json").write_text(content)
        (tmp_path / name / "tokenizer" / "tokenizer_config.json").write_text("{}")
    assert find_clip_tokens(tmp_path, "llm") is None
    shutil.copytree(tokenizer, tmp_path / "sdxl" / "tokenizer")
    assert find_clip_tokens(tmp_path, "llm").count("a cat") > 0


def test_tags_by_frequency_without_the_trigger():
    text = caption_table({"a.txt": "sks, hat, hat, smile, 1girl", "b.txt": "sks, smile, x, y"}, "sks", 3, None)
    assert text.splitlines()[:4] == [
        "most frequent of the 5 tags in 2 captions:",
        "  smile                              2  100%",
        "  hat                                1   50%",
        "  1girl                              1   50%",
    ]
    assert "fewer than" not in text
    assert "caption lengths are not checked" in text


def test_many_tags_are_counted_and_not_all_shown():
    text = caption_table({"a.txt": ", ".join(f"tag {number}" for number in range(50))}, "sks", 3, None)
    assert "  and 30 more" in text


def test_captions_with_few_tags_and_long_ones_are_named(tokenizer):
    captions = {"a.txt": "sks, hat, dog", "b.txt": "sks", "c.txt": "sks, " + ", ".join(["smile"] * 200), "d.txt": "sks, a, b, c"}
    text = caption_table(captions, "sks", 1, ClipTokens(tokenizer))
    assert "captions with fewer than 3 tags: 2 (a.txt, b.txt)" in text
    assert "captions longer than the 75 tokens that training reads: 1 (c.txt)" in text
    assert "longer" not in caption_table({"d.txt": "sks, a, b, c"}, "sks", 1, ClipTokens(tokenizer))
