"""Captions of the prompts that images were made from."""

import hashlib
import json

import pytest
from PIL import Image

from captioning.config import CaptionSettings
from captioning.prompt_captions import ImagePrompt, PromptRules, prompt_caption
from collecting.preflight import SHIPPED_PERSON
from collecting.prompt_texts import prompt_texts
from common.settings import REPOSITORY

GOLDEN = REPOSITORY / "tests" / "data" / "prompt_captions"
TRIGGER = "nyafyi_woman"
DEFAULTS = CaptionSettings()
RULES = PromptRules(TRIGGER, DEFAULTS.caption_prompt_person, DEFAULTS.caption_prompt_remove)


def caption(text: str, person: str = "", rules: PromptRules = RULES) -> str:
    sentence = rules.sentence(ImagePrompt((text,), person))
    return prompt_caption(TRIGGER, (), sentence) if sentence else ""


def golden(name: str) -> list[str]:
    return (GOLDEN / f"{name}.txt").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(("name", "person"), [("", SHIPPED_PERSON), ("workflows/qwen_image_edit_2511", "")])
def test_included_workflows_make_these_captions(name, person):
    graph = json.loads((REPOSITORY / name / "workflow_api.json").read_text(encoding="utf-8"))
    kept = [
        node_id
        for node_id, node in graph.items()
        if node["class_type"] == "SaveImage" and not node["inputs"]["filename_prefix"].endswith("CC")
    ]
    captions = []
    for node_id in kept:
        sentence = RULES.sentence(ImagePrompt(tuple(prompt_texts(graph, node_id)), person))
        captions.append(prompt_caption(TRIGGER, (), sentence))
    assert captions == golden("included_workflows")


def test_example_prompts_make_these_captions():
    entries = json.loads((REPOSITORY / "prompts_example.json").read_text(encoding="utf-8"))
    assert [caption(entry["prompt"]) for entry in entries] == golden("prompts_example")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A person sitting in a cafe. The person smiles.", f"{TRIGGER} sitting in a cafe. {TRIGGER} smiles."),
        ("(masterpiece:1.2), best quality, ((a person)), [red] hat:1, 8k, <lora:x:0.8> park", f"{TRIGGER}, [red] hat:1, park"),
        ("A walk at f/1.8, 50mm. Best quality.", f"{TRIGGER}, a walk at f/1.8, 50mm."),
        ("NASA suit, smiling", f"{TRIGGER}, NASA suit, smiling"),
        ("smiling in the rain\nwet street, a person\n", f"{TRIGGER}, smiling in the rain, wet street"),
        ("Close-up in a park! A realistic photograph of a person.", f"{TRIGGER}, close-up in a park!"),
        ("sharp focus on the eyes", f"{TRIGGER}, sharp focus on the eyes"),  # only a phrase of its own is left out
        ("unhigh quality, an apersonable man", f"{TRIGGER}, unhigh quality, an apersonable man"),
        ("Do not copy the pose, the light or the rest. In a park", f"{TRIGGER}, in a park"),
        ("a tag with \x00 and \x1b[0m in it", f"{TRIGGER}, a tag with  and [0m in it".replace("  ", " ")),
        ("hat \\(straw\\)", f"{TRIGGER}, hat \\(straw\\)"),
        ("Create a new image. Best quality. A photo of a person.", ""),
        (" . , ", ""),
    ],
)
def test_prompt_becomes_a_sentence(text, expected):
    assert caption(text) == expected


def test_description_of_the_person_is_replaced_wherever_it_is_and_however_it_is_spaced():
    person = "A photo of a woman of thirty, with red curls\nand freckles."
    assert caption("a photo of a woman of thirty,  with red curls and freckles. In a park.", person) == f"{TRIGGER}, in a park."
    assert (
        caption("In a park: A photo of a woman of thirty, with red curls and freckles", person)
        == f"{TRIGGER}, in a park: {TRIGGER}"
    )
    assert caption("in a park", "(") == f"{TRIGGER}, in a park"


def test_rules_are_settings():
    rules = PromptRules("sks", ["my model (x)"], ["*wallpaper", "in the style of * painter", "a.b"])
    prompt = ImagePrompt(("My  model (x) walks, a nice wallpaper, in the style of some painter, a.b, axb",), "")
    assert rules.sentence(prompt) == "axb"
    assert PromptRules("sks", (), ()).sentence(ImagePrompt(("a person, 8k",), "")) == "a person, 8k"


def test_first_text_that_says_something_is_used():
    assert RULES.sentence(ImagePrompt(("best quality", "A photo of a person.", "in a park", "elsewhere"), "")) == "in a park"


def test_tags_come_before_the_sentence():
    assert prompt_caption("sks", ["1girl", "smile", "SKS"], "A walk.") == "sks, 1girl, smile, a walk."
    assert prompt_caption("sks", ["smile"], "sks walks.") == "sks, smile, sks walks."


SCENES = {"a": "A person walks in a park.", "b": "Create a new image. A person drinks coffee.", "c": "best quality"}


@pytest.fixture
def collected(stage, photographs):
    """Images `a` to `d`, and a manifest with prompts for the first three."""
    for name, photograph in zip("abcd", photographs.values(), strict=True):
        photograph.save(stage.images / f"{name}.png", compress_level=0)
    write_manifest(stage, {name: {"texts": [text], "prompt": text} for name, text in SCENES.items()})
    return stage


def write_manifest(stage, details):
    lines = []
    for name, more in details.items():
        sha256 = hashlib.sha256((stage.images / f"{name}.png").read_bytes()).hexdigest()
        lines.append(json.dumps({"file": f"images/{name}.png", "sha256": sha256, **more}) + "\n")
    (stage.images.parent / "manifest.jsonl").write_text("".join(lines))


def test_prompts_become_captions_and_images_without_one_get_tags(collected):
    collected.run()
    tags = collected.captions()
    ended = collected.run(CAPTION_SOURCE="prompt")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "of 2 of 4 images\n2 images without a prompt" in ended.stdout
    assert "are captioned with tags: c.png, d.png" in ended.stdout
    scenes = {"a.txt": f"{TRIGGER} walks in a park.\n", "b.txt": f"{TRIGGER} drinks coffee.\n"}
    assert collected.captions() == tags | scenes
    assert "nothing to do" in collected.run(CAPTION_SOURCE="prompt").stdout
    collected.run(CAPTION_SOURCE="both")
    both = collected.captions()
    assert both["a.txt"] == f"{tags['a.txt'].strip()}, {TRIGGER} walks in a park.\n"
    assert both["d.txt"] == tags["d.txt"]
    collected.run(CAPTION_SOURCE="prompt", CAPTION_APPEND="photo", TRIGGER_WORD="sks")
    assert collected.captions()["a.txt"] == "sks, photo, sks walks in a park.\n"
    collected.run()
    assert collected.captions() == tags


def test_no_tagger_is_needed_where_every_image_has_a_prompt(collected):
    for name in "cd":
        (collected.images / f"{name}.png").unlink()
    ended = collected.run(CAPTION_SOURCE="prompt", CAPTION_MODEL="someone/absent")
    assert (ended.returncode, len(collected.captions())) == (0, 2)


def test_captions_of_prompts_are_undone_and_those_of_the_user_are_kept(collected):
    (collected.images / "a.txt").write_text("mine")
    collected.run(CAPTION_SOURCE="prompt")
    assert collected.captions()["a.txt"] == f"{TRIGGER}, mine"
    (collected.images / "b.txt").write_text(f"{TRIGGER} drinks tea.\n")
    collected.run(CAPTION_SOURCE="prompt", TRIGGER_WORD="sks")
    assert collected.captions()["b.txt"] == f"sks, {TRIGGER} drinks tea.\n"
    collected.run("--undo")
    collected.run("--undo")
    assert collected.captions() == {"a.txt": "mine", "b.txt": f"{TRIGGER} drinks tea.\n"}


def test_images_are_matched_by_their_content_and_then_by_their_name(collected):
    (collected.images / "a.png").rename(collected.images / "renamed.png")
    (collected.images / "b.png").unlink()
    Image.new("RGB", (64, 64), (9, 8, 7)).save(collected.images / "b.png")  # another image under the name of a collected one
    collected.run(CAPTION_SOURCE="prompt")
    captions = collected.captions()
    assert captions["renamed.txt"] == f"{TRIGGER} walks in a park.\n"
    assert "coffee" not in captions["b.txt"]


def test_manifest_of_an_earlier_version_is_read_as_well_as_it_can_be(collected):
    texts = ["A walk in a park, detailed.\nCreate a new image.", "best quality\na person on a chair", "a person"]
    write_manifest(collected, {name: {"prompt": text} for name, text in zip("abc", texts, strict=True)})
    collected.run(CAPTION_SOURCE="prompt")
    captions = collected.captions()
    assert captions["a.txt"] == f"{TRIGGER}, a walk in a park, detailed.\n"
    assert captions["b.txt"] == f"{TRIGGER} on a chair\n"


def test_damaged_manifest_and_prompts_that_are_none_are_ignored(collected):
    odd = [{"texts": "x", "prompt": 3}, {"texts": [None, " ", "x" * 5_001]}, {"texts": ["\ud800 a \x00walk"], "person": ["x"]}]
    write_manifest(collected, dict(zip("abc", odd, strict=True)))
    manifest = collected.images.parent / "manifest.jsonl"
    manifest.write_text(manifest.read_text() + '{"file": 3, "sha256": []}\nnot json\n[]\n')
    ended = collected.run(CAPTION_SOURCE="prompt")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "of 1 of 4 images" in ended.stdout
    assert collected.captions()["c.txt"] == f"{TRIGGER}, a walk\n"


def test_long_prompts_and_patterns_take_no_time(collected):
    rules = PromptRules("sks", ["a * b * c"], ["*x*y*", "z *"])
    assert rules.sentence(ImagePrompt(("a b, " * 1_000,), "q " * 2_000))
    assert PromptRules("s" * 99, ["a"], ()).sentence(ImagePrompt(("a " * 2_000,), "")) == ""  # too long with the trigger word


def test_manifest_that_cannot_be_read_ends_the_stage_with_one_line(collected):
    manifest = collected.images.parent / "manifest.jsonl"
    manifest.unlink()
    manifest.mkdir()
    ended = collected.run(CAPTION_SOURCE="prompt")
    assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 1)
    assert "manifest.jsonl" in ended.stderr
