"""Folders with settings of their own, lists of captions and several captions per file, in the caption stage."""

import json

import pytest
from PIL import Image

from captioning.journal import CaptionFiles
from common.caption_lists import read_caption_list
from common.captions import MAX_CAPTION_BYTES, UnusableCaptionError, read_caption
from common.dataset_layout import DatasetFolder


def save(photographs: dict[str, Image.Image], folder, **names: str) -> None:
    for photograph, name in names.items():
        (folder / name).parent.mkdir(exist_ok=True)
        photographs[photograph].save(folder / name, compress_level=1)


def test_each_folder_has_its_own_trigger_word_and_source(stage, photographs):
    save(photographs, stage.images, astronaut="alice/a.png", coffee="3_bob/b.png", chelsea="c.png", rocket="alice/d.png")
    (stage.images / "alice" / "folder.toml").write_text('trigger = "alice"\nclass = "woman"')
    (stage.images / "3_bob" / "folder.toml").write_text('trigger = "bob"\ncaption_source = "prompt"')
    (stage.images / "alice" / "d.txt").write_text("in front of bob")
    regularization = stage.images.parent / "regularization" / "1_woman"
    regularization.mkdir(parents=True)
    save(photographs, regularization, coffee="r.png")
    ended = stage.run()
    assert ended.returncode == 0
    captions = {path.relative_to(stage.images).as_posix(): path.read_text() for path in stage.images.rglob("*.txt")}
    assert {name: text.split(", ")[0] for name, text in captions.items()} == {
        "alice/a.txt": "alice",
        "3_bob/b.txt": "bob",
        "c.txt": "nyafyi_woman",
        "alice/d.txt": "alice",
    }
    assert captions["alice/d.txt"] == "alice, in front of bob"
    assert "of 3 concepts: bob, alice (woman), nyafyi_woman" in ended.stdout
    assert "prompts in" in ended.stdout  # of bob's folder alone, whose image has none
    assert "1 images without a prompt" in ended.stdout
    assert "trigger word 'bob': 1 captions of other concepts contain it: alice/d.txt" in ended.stdout
    assert list(regularization.iterdir()) == [regularization / "r.png"]
    audit = json.loads((stage.images.parent / ".loracat" / "audit.json").read_text())
    assert audit["pictures"] == 4  # coffee.png is not a duplicate of the regularization image
    assert "near-duplicate" not in json.dumps(audit)
    (stage.images / "alice" / "folder.toml").write_text('trigger = "carol"')
    assert stage.run().returncode == 0
    assert (stage.images / "alice" / "d.txt").read_text() == "carol, in front of bob"
    assert (stage.images / "alice" / "a.txt").read_text().startswith("carol, ")


def test_clashing_trigger_words_are_one_line_and_exit_3(stage, photographs):
    save(photographs, stage.images, astronaut="1_a/a.png", coffee="1_b/b.png")
    (stage.images / "1_a" / "folder.toml").write_text('trigger = "alice"')
    (stage.images / "1_b" / "folder.toml").write_text('trigger = "Alice"')
    for flags in ((), ("--check",)):
        ended = stage.run(*flags)
        assert ended.returncode == 3
        assert "'alice' (1_a) and 'Alice' (1_b) are the same to the text encoders" in ended.stderr
    assert not list(stage.images.rglob("*.txt"))


def test_listed_captions_are_copied_with_the_trigger_word_and_follow_the_list(stage, photographs):
    save(photographs, stage.images, astronaut="a.png", coffee="b.png", chelsea="c.png")
    listed = stage.images / "metadata.jsonl"
    lines = [{"file_name": "a.png", "text": "an astronaut"}, {"file_name": "b.png", "text": "a cup"}]
    listed.write_text("\n".join(map(json.dumps, lines)))
    (stage.images / "b.txt").write_text("mine")
    ended = stage.run()
    assert ended.returncode == 0
    assert (stage.images / "a.txt").read_text() == "nyafyi_woman, an astronaut"
    assert (stage.images / "b.txt").read_text() == "nyafyi_woman, mine"
    assert "1 captions copied to .txt files" in ended.stdout
    assert "1 captioned" in ended.stdout  # c.png, with tags
    lines[0]["text"] = "another one"
    listed.write_text("\n".join(map(json.dumps, lines)))
    stage.run()
    assert (stage.images / "a.txt").read_text() == "nyafyi_woman, another one"
    stage.run("--undo")
    assert (stage.images / "a.txt").read_text() == "nyafyi_woman, an astronaut"


def test_several_captions_per_file_each_gain_the_trigger_word_on_request(stage, photographs):
    save(photographs, stage.images, astronaut="a.png")
    (stage.images / "a.txt").write_text("an astronaut\n\nnyafyi_woman smiles\nblue suit, (flag:1.2)\n")
    stage.run(CAPTION_PER_LINE=1)
    text = "nyafyi_woman, an astronaut\n\nnyafyi_woman smiles\nnyafyi_woman, blue suit, (flag:1.2)\n"
    assert (stage.images / "a.txt").read_text() == text
    ended = stage.run(CAPTION_PER_LINE=1)
    assert "nothing to do" in ended.stdout
    assert "captions with weights such as (word:1.2): 1 (a.txt line 3)" in ended.stdout
    assert (stage.images / "a.txt").read_text() == text


def test_check_shows_the_folders(stage, photographs):
    save(photographs, stage.images, astronaut="alice/a.png", coffee="b.png")
    (stage.images / "alice" / "folder.toml").write_text('trigger = "alice"\nrepeats = 4')
    shown = [line.split() for line in stage.run("--check").stdout.splitlines()]
    assert ["images", "1", "0", "0", "1", "nyafyi_woman", "-", "-"] in shown
    assert ["images/alice", "1", "0", "0", "4", "alice", "-", "-"] in shown


def test_the_trigger_word_fits_into_the_longest_caption_of_a_list(tmp_path):
    """And a file that is full already is named and left as it is, instead of becoming one that no stage reads."""
    folder = DatasetFolder(tmp_path)
    folder.images.mkdir()
    image, listed = folder.images / "a.png", "x" * (60 * 2**10)
    (folder.images / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": listed}))
    captions = CaptionFiles(folder, "nyafyi_woman")
    assert captions.copy(image, folder.images / "a.txt", read_caption_list(folder.images)[image])
    assert read_caption(folder.images / "a.txt", folder.root) == f"nyafyi_woman, {listed}"
    full = folder.images / "b.txt"
    full.write_text("x" * MAX_CAPTION_BYTES)
    with pytest.raises(UnusableCaptionError, match="would be larger than the 64 KiB of a caption with the trigger word in it"):
        captions.ensure_trigger(full)
    assert full.read_text() == "x" * MAX_CAPTION_BYTES
