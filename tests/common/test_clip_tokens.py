"""CLIP's tokenizers are found in model folders, and tokens are counted as training counts them, without torch."""

import json
import os
import shutil

import pytest

from common.clip_tokens import ClipTokens, find_clip_tokens, find_tokenizers_in, find_vocabulary, read_vocabulary

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

    tokenizer_of_training = CLIPTokenizer.from_pretrained(tokenizer)
    expected = [len(tokenizer_of_training(text, add_special_tokens=False)["input_ids"]) for text in TEXTS]
    assert [ClipTokens(tokenizer).count(text) for text in TEXTS] == expected
    in_one = tmp_path / "whole"
    tokenizer_of_training.save_pretrained(in_one)
    assert (in_one / "tokenizer.json").is_file()
    assert [ClipTokens(in_one).count(text) for text in TEXTS] == expected


def test_vocabulary_of_two_files_is_enough(tokenizer, tmp_path):
    from transformers import CLIPTokenizer

    tokenizer_of_training = CLIPTokenizer.from_pretrained(tokenizer)
    tokenizer_of_training.save_pretrained(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    expected = [len(tokenizer_of_training(text, add_special_tokens=False)["input_ids"]) for text in TEXTS]
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


def test_both_tokenizers_of_a_given_vocabulary_size_are_found(tiny_sdxl, tmp_path):
    size = len(read_vocabulary(tiny_sdxl / "tokenizer"))
    assert size > 500
    (tmp_path / "a.safetensors").write_bytes(b"")
    shutil.copytree(tiny_sdxl / "tokenizer", tmp_path / "only_one" / "tokenizer")
    assert find_tokenizers_in(tmp_path, size) is None
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(tiny_sdxl / name, tmp_path / "sdxl" / name)
    assert find_tokenizers_in(tmp_path, size) == tmp_path / "sdxl"
    assert find_tokenizers_in(tmp_path, size + 1) is None
    assert find_tokenizers_in(tmp_path / "missing", size) is None


@pytest.mark.parametrize("file", ["tokenizer_config.json", "vocab.json", "merges.txt"])
def test_a_tokenizer_with_a_missing_or_truncated_file_has_no_vocabulary(tiny_sdxl, tmp_path, file):
    folder = shutil.copytree(tiny_sdxl / "tokenizer", tmp_path / "tokenizer")
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: len(content) // 2])
    assert read_vocabulary(folder) == {}
    (folder / file).unlink()
    assert read_vocabulary(folder) == {}


@pytest.mark.parametrize("merges", ["a", "a b c", "a unknown", "\xa0 a"])
def test_a_vocabulary_without_its_merges_is_damaged(tokenizer, tmp_path, merges):
    shutil.copytree(tokenizer, tmp_path / "base" / "tokenizer")
    with (tmp_path / "base" / "tokenizer" / "merges.txt").open("a", encoding="utf-8") as file:
        file.write(f"{merges}\n")
    assert read_vocabulary(tmp_path / "base" / "tokenizer") == {}
    assert find_clip_tokens(tmp_path, "base") is None


@pytest.mark.parametrize("number", ["text", 1.5, -1, 1 << 40, None])
def test_a_vocabulary_with_something_else_than_ids_is_damaged(tokenizer, tmp_path, number):
    shutil.copytree(tokenizer, tmp_path / "base" / "tokenizer")
    vocabulary = tmp_path / "base" / "tokenizer" / "vocab.json"
    vocabulary.write_text(json.dumps(json.loads(vocabulary.read_text()) | {"a": number}))
    assert find_clip_tokens(tmp_path, "base") is None


@pytest.fixture(scope="module")
def in_one_file(tokenizer, tmp_path_factory):
    """The same tokenizer as a tokenizer.json."""
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("in_one_file")
    CLIPTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    assert not (folder / "vocab.json").exists()
    return folder


DAMAGES = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "not JSON": lambda content: b"<html>",
    "another encoding": lambda content: content.decode().encode("utf-16"),
    "an invalid byte": lambda content: content.replace(b'"', b'"\xe9', 1),
    "too deep": lambda content: b"[" * 100_000,
    "too deep in an object": lambda content: b'{"a":' * 100_000,
    "a list": lambda content: b"[]",
    "null": lambda content: b"null",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["in one file", "in two files"])
def test_a_damaged_file_of_a_tokenizer_is_like_a_missing_one(tokenizer, in_one_file, tmp_path, kind, damage):
    names = {"in one file": ["tokenizer.json", "tokenizer_config.json"], "in two files": ["vocab.json", "tokenizer_config.json"]}
    source = in_one_file if kind == "in one file" else tokenizer
    for name in names[kind]:
        folder = shutil.copytree(source, tmp_path / name / "base" / "tokenizer")
        (folder / name).write_bytes(DAMAGES[damage]((folder / name).read_bytes()))
        assert find_clip_tokens(tmp_path / name, "base") is None
        assert find_vocabulary(tmp_path / name, "base") == {}


SPACES = {"type": "Replace", "pattern": {"Regex": ""}, "content": " "}
"""At which the package panics when it encodes."""


@pytest.mark.parametrize("value", [3, {"type": "Sequence", "normalizers": [{"type": "NFC"}, SPACES, {"type": "Lowercase"}]}])
@pytest.mark.parametrize("key", ["version", "normalizer", "pre_tokenizer", "decoder", "truncation", "padding", "added_tokens"])
def test_of_a_tokenizer_in_one_file_only_words_and_merges_are_used(in_one_file, tmp_path, key, value):
    """Everything else is the same for each CLIP, whatever a damaged file says."""
    folder = shutil.copytree(in_one_file, tmp_path / "base" / "tokenizer")
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(content | {key: value}))
    assert find_clip_tokens(tmp_path, "base").count("sks, a cat") == ClipTokens(in_one_file).count("sks, a cat")


@pytest.mark.parametrize("key", ["vocab", "merges"])
@pytest.mark.parametrize("value", [3, None, [], ["a"], [["a", "b", "c"]], {"a": -1}])
def test_a_tokenizer_in_one_file_with_wrong_words_or_merges_is_not_used(in_one_file, tmp_path, key, value):
    folder = shutil.copytree(in_one_file, tmp_path / "base" / "tokenizer")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"][key] = value
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert find_clip_tokens(tmp_path, "base") is None
    assert find_vocabulary(tmp_path, "base") == {}


def test_a_tokenizer_without_the_end_of_a_text_is_not_used(in_one_file, tmp_path):
    """It stands for what the tokenizer does not know."""
    folder = shutil.copytree(in_one_file, tmp_path / "base" / "tokenizer")
    content = json.loads((folder / "tokenizer.json").read_text())
    del content["model"]["vocab"]["<|endoftext|>"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert find_clip_tokens(tmp_path, "base") is None


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.json"])
def test_what_is_not_a_file_is_not_read(tokenizer, tmp_path, make, name):
    folder = shutil.copytree(tokenizer, tmp_path / "base" / "tokenizer")
    (folder / name).unlink(missing_ok=True)
    if name == "tokenizer.json":
        (folder / "vocab.json").unlink()
    make(folder / name)
    assert find_clip_tokens(tmp_path, "base") is None
