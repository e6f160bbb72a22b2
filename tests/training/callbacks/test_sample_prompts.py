"""The prompts of sample images: those made from the captions, and those that a user writes."""

import json

import pytest

from common.errors import SettingsError
from training.callbacks.sample_prompts import (
    MAX_PROMPTS,
    SCENES,
    SamplePrompt,
    class_word,
    default_prompts,
    sample_prompts,
    unseen_scenes,
)
from training.config import SampleSettings

CAPTIONS = ["sks, 1girl, beach, sunset", "sks, 1girl, snow, forest, smile", "sks, a woman in a library"]


def written(text: str) -> list[SamplePrompt]:
    return sample_prompts(SampleSettings(sample_prompts=text), {"sks": CAPTIONS}, {})


def test_six_prompts_are_made_from_the_captions():
    prompts = default_prompts({"sks": CAPTIONS}, {})
    assert [(prompt.text, prompt.kind) for prompt in prompts] == [
        *[("sks", "trigger")] * 3,
        ("sks, in a city street at night", "scene"),  # beach, snow and library are in captions
        ("sks, in a desert", "scene"),
        ("1girl", "class"),
    ]
    assert default_prompts({"sks": CAPTIONS}, {}, " old man ")[-1].text == "old man"


def test_scenes_that_no_caption_has_come_first():
    every = [word for words in SCENES.values() for word in words]
    assert set(unseen_scenes([f"sks, {word}" for word in every if word not in ("kitchen", "castle")])) == {
        "in a kitchen",
        "in a medieval castle",
    }
    assert len(set(unseen_scenes([", ".join(every)]))) == 2  # none is left: still two
    assert unseen_scenes([]) == unseen_scenes(["sks, indoors"])


@pytest.mark.parametrize(
    ("trigger", "captions", "word"),
    [
        ("sks", ["sks, 1boy, hat", "sks, 1boy"], "1boy"),
        ("sks", ["sks, a photo of a Dog on grass", "sks, dog"], "dog"),
        ("sks", ["sks, woman, man", "sks, man, woman"], "woman"),
        ("nyafyi_woman", ["nyafyi_woman, smile"], "woman"),  # only the trigger word has it
        ("my woman", ["my woman, 1girl", "my woman, 1girl, hat"], "1girl"),
        ("sks", ["sks, teapot, table", "sks, teapot"], "teapot"),
        ("sks", ["sks"], "person"),
        ("sks", [], "person"),
        ("sks", ["sks. It is a long sentence about something that has no class word at all"], "person"),
    ],
)
def test_class_word(trigger, captions, word):
    assert class_word(trigger, captions) == word


KOHYA = """
# a comment
sks, portrait --n blurry, low-res --w 832 --h 1216 --d 7 --l 5.5 --s 24

sks -- with a dash, and -n nothing --ss euler_a --W 100 --fs 3
"""


def test_kohyas_notation():
    assert written(KOHYA) == [
        SamplePrompt("sks, portrait", "user", "blurry, low-res", 832, 1216, 7, 5.5, 24),
        SamplePrompt("sks -- with a dash, and -n nothing", "user", width=64),  # rounded down to a multiple of 64
    ]


@pytest.mark.parametrize("suffix", [".json", ".txt"])
def test_json_from_a_file_or_as_text(tmp_path, suffix):
    entries = ["a cat", {"prompt": "sks", "negative_prompt": "x", "width": 1000, "height": 512.0, "seed": 1, "scale": 3}]
    expected = [SamplePrompt("a cat", "user"), SamplePrompt("sks", "user", "x", 960, 512, 1, 3.0)]
    text = json.dumps([*entries, {"prompt": "p", "sample_steps": 9, "enum": 4}])
    expected.append(SamplePrompt("p", "user", steps=9))
    file = tmp_path / f"prompts{suffix}"
    file.write_text(f"\ufeff{text}", encoding="utf-8")
    assert written(text) == written(str(file)) == expected
    assert written('{"prompt": "one"}') == [SamplePrompt("one", "user")]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("prompts/none.txt", "prompts/none.txt is not a file"),
        ("none.json", "none.json is not a file"),
        ("[1]", 'prompt 1: must be a text, or an object with a "prompt"'),
        ('[{"text": "x"}]', 'prompt 1: must be a text, or an object with a "prompt"'),
        ('[{"prompt": "x", "seed": -1}]', "prompt 1: seed must be a number from 0 to"),
        ('[{"prompt": "x", "seed": true}]', "prompt 1: seed must be a number"),
        ('[{"prompt": "x", "width": 99.5}]', "prompt 1: width must be a number from 64 to 4096"),
        ('[{"prompt": "x", "scale": NaN}]', "prompt 1: guidance must be a number"),
        ('[{"prompt": "x", "scale": [1]}]', "prompt 1: guidance must be a number"),
        ('[{"prompt": "x", "negative_prompt": 3}]', "prompt 1: the negative must be a text"),
        ('["x"', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "there is no prompt in it"),
        ("# nothing", "there is no prompt in it"),
        ("\n".join("x" for _ in range(MAX_PROMPTS + 1)), "33 prompts are too many"),
        ("x --w wide\ny --s 0 --l -1", "line 1: width must be a number"),
        ("x --w wide\ny --s 0 --l -1", "line 2: steps must be a number from 1 to"),
        ("x --d 99999999999999999999", "line 1: seed must be a number"),
    ],
)
def test_what_is_wrong_is_named(text, problem):
    with pytest.raises(SettingsError) as refused:
        written(text)
    assert problem in str(refused.value)
    assert "SAMPLE_PROMPTS" in str(refused.value)


def test_a_file_that_is_not_text_is_named(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match=r"prompts\.txt cannot be read: it is not UTF-8"):
        written(str(file))
