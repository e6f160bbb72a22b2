"""folder.toml, lists of captions and the table of folders: what belongs to the data set, and one line for what is wrong."""

import json
from pathlib import Path

import pytest
from PIL import Image

from common.caption_lists import read_caption_list
from common.dataset_layout import DatasetFolder, find_images, find_regularization_images, name_in, select_images
from common.dataset_table import dataset_table
from common.errors import DataError
from common.image_folders import ImageFolder, find_folders
from common.triggers import classes_of, contained_triggers, foreign_triggers
from common.unused_entries import unused_entries


@pytest.fixture
def dataset(tmp_path) -> DatasetFolder:
    folder = DatasetFolder(tmp_path / "dataset")
    folder.images.mkdir(parents=True)
    return folder


def table_of(dataset) -> str:
    return dataset_table(dataset, select_images(dataset), find_regularization_images(dataset), "sks")


def add(folder, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)


def names_of(dataset: DatasetFolder) -> dict[str, int]:
    return {name_in(dataset.images, image.path): image.folder.repeats for image in find_images(dataset.images)}


def test_a_folder_file_makes_a_folder_part_of_the_data_set_and_counts_more_than_the_name(dataset):
    add(dataset.images, "top.png", "alice/a.png", "3_bob/b.png", "5_carol/c.png", "0_old/d.png", "dora/e.png", "other/f.png")
    for name, content in {
        "alice": 'repeats = 2\ntrigger = "alice"\nclass = "young woman"\ncaption_source = "both"\n'
        "mask_weight = 0.5\nresolution = [768, 1024]\n",
        "3_bob": '\ufefftrigger = "bob"\r\n',
        "5_carol": "repeats = 1",
        "dora": "repeats = 0",
    }.items():
        (dataset.images / name / "folder.toml").write_bytes(content.encode())
    assert names_of(dataset) == {"3_bob/b.png": 3, "5_carol/c.png": 1, "alice/a.png": 2, "top.png": 1}
    folders = {folder.path.name: folder for folder in find_folders(dataset.images)}
    assert folders["alice"] == ImageFolder(dataset.images / "alice", 2, "alice", "young woman", "both", 0.5, (1024, 768))
    assert folders["images"] == ImageFolder(dataset.images)
    assert unused_entries(dataset.images, find_images(dataset.images)) == {
        "other": "a folder with images; call it N_name for N repeats to use it"
    }
    add(dataset.images, "999999_many/g.png")
    most = "a folder with images; call it N_name for N repeats, at most 99999, to use it"
    assert unused_entries(dataset.images, find_images(dataset.images))["999999_many"] == most
    dataset.exclusions.write_text("alice\n")
    assert "alice/a.png" not in [name_in(dataset.images, image.path) for image in select_images(dataset).images]
    (dataset.images / "folder.toml").write_text('trigger = "top word"')
    assert find_folders(dataset.images)[0].trigger == "top word"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"repeats = -1", "3_a/folder.toml: repeats: must be a whole number from 0 to 99999 (is -1)"),
        (b"repeats = 2.0", "must be a whole number from 0 to 99999 (is 2.0)"),
        (b"repeats = true", "must be a whole number"),
        (b'trigger = "a, b"', "3_a/folder.toml: trigger: 'a, b' must be one tag, without commas"),
        (b'trigger = ""', "must be one tag"),
        (b"class = 5", "3_a/folder.toml: class: must be a text in quotation marks (is 5)"),
        (b'caption_source = "prompts"', '3_a/folder.toml: caption_source: must be "tags", "prompt" or "both" (is \'prompts\')'),
        (b"mask_weight = 2", "3_a/folder.toml: mask_weight: must be a number from 0 to 1 (is 2)"),
        (b"resolution = [1024, 5]", "3_a/folder.toml: resolution: must be a whole number from 64 to 4096, or a list of them"),
        (b"resolution = []", "3_a/folder.toml: resolution: must be a whole number from 64 to 4096"),
        (
            b"repeat = 2",
            "3_a/folder.toml: unknown key 'repeat'; known: repeats, trigger, class, caption_source, mask_weight, resolution",
        ),
        (b"repeats = ", "3_a/folder.toml: not valid TOML"),
        (b"\xff\xfe", "3_a/folder.toml: not valid TOML"),
        (b"a = " + b"[" * 5000, "3_a/folder.toml: not valid TOML"),
        (b'"\\u001b[2J\\n" = 1', "3_a/folder.toml: unknown key '\\x1b[2J\\n'; known"),
        (b"k" * 3000 + b" = 1", f"3_a/folder.toml: unknown key '{'k' * 59}...; known"),
        (
            b"repeats = 0x" + b"f" * 5000,
            "3_a/folder.toml: repeats: must be a whole number from 0 to 99999 (is a number of thousands",
        ),
        (b"resolution = [0x" + b"f" * 5000 + b"]", "3_a/folder.toml: resolution: must be a whole number from 64 to 4096"),
        (b"repeats = 2\n" + b"#" * (1 << 16), "3_a/folder.toml: is larger than 64 KiB"),
    ],
)
def test_a_folder_file_that_cannot_be_used_is_one_line_with_the_file(dataset, content, line):
    add(dataset.images, "3_a/1.png", "4_b/1.png")
    (dataset.images / "3_a" / "folder.toml").write_bytes(content)
    (dataset.images / "4_b" / "folder.toml").mkdir()
    with pytest.raises(DataError) as caught:
        find_images(dataset.images)
    assert line in str(caught.value)
    assert "4_b/folder.toml: cannot be read: Is a directory" in str(caught.value)  # all files in one list
    assert len(str(caught.value).splitlines()) == 3


def folders_of(**triggers: tuple[str, str]) -> list[ImageFolder]:
    return [ImageFolder(Path(name), trigger=trigger, class_word=kind) for name, (trigger, kind) in triggers.items()]


def test_concepts_are_the_different_trigger_words_with_their_classes():
    folders = folders_of(a=("alice", ""), b=("bob", "man"), c=("alice", "woman"), images=("", ""))
    assert classes_of(folders, "sks") == {"alice": "woman", "bob": "man", "sks": ""}


@pytest.mark.parametrize("other", ["Alice", "ALICE", "a_lice", "a lice"])
def test_trigger_words_that_the_text_encoders_cannot_distinguish_are_refused(other):
    first = "a lice" if " " in other or "_" in other else "alice"
    if other == first:
        first = "a_lice"
    with pytest.raises(DataError, match="are the same to the text encoders"):
        classes_of(folders_of(a=(first, ""), b=(other, "")), "sks")


def test_one_trigger_word_with_two_classes_is_refused():
    with pytest.raises(DataError, match="'alice' is the trigger word of the classes 'woman' and 'man'"):
        classes_of(folders_of(a=("alice", "woman"), b=("alice", "man")), "sks")


def test_a_class_that_contains_its_trigger_word_is_refused():
    with pytest.raises(DataError, match="a: the class 'alice woman' contains the trigger word 'alice'; name it alone"):
        classes_of(folders_of(a=("alice", "alice woman"), b=("bob", "man")), "sks")


@pytest.mark.parametrize(
    ("first", "second", "is_part"),
    [
        ("alice", "alice armor", True),
        ("alice_armor", "alice", True),
        ("ohwx", "ohwx2", True),  # CLIP splits letters and digits
        ("Anne", "anne-marie", True),
        ("alice", "alicent", False),
        ("nya woman", "nyafyi woman", False),
    ],
)
def test_a_trigger_word_inside_another_is_reported(first, second, is_part):
    assert bool(contained_triggers([first, second])) is is_part


def test_trigger_words_in_captions_of_others_are_reported_with_their_names():
    captions = {
        "a.txt": ("alice", "alice, bob, smile"),
        "b.txt": ("bob", "bob, smile"),
        "r.txt": ("", "woman, Alice"),
        "c.txt": ("alice armor", "alice armor, smile"),
    }
    assert foreign_triggers(captions) == [
        "trigger word 'alice': 1 captions of other concepts contain it: r.txt; "
        "remove it where the image does not show what it stands for",
        "trigger word 'bob': 1 captions of other concepts contain it: a.txt; "
        "remove it where the image does not show what it stands for",
    ]


def test_regularization_images_have_the_class_of_their_folder(dataset):
    add(dataset.regularization[0], "1_old_woman/a.png", "named/b.png", "c.png")
    add(dataset.regularization[1], "2_man/d.png", "0_off/e.png")
    (dataset.regularization[0] / "named" / "folder.toml").write_text('class = "girl"')
    found = {name_in(dataset.root, image.path): image for image in find_regularization_images(dataset)}
    assert {name: (image.folder.class_word, image.folder.repeats) for name, image in found.items()} == {
        "regularization/1_old_woman/a.png": ("old woman", 1),
        "regularization/c.png": ("", 1),
        "regularization/named/b.png": ("girl", 1),
        "reg/2_man/d.png": ("man", 2),
    }
    assert [image.has_caption for image in found.values()] == [True, False, True, True]
    assert find_images(dataset.images) == []


def test_keys_without_effect_on_regularization_images_are_named(dataset):
    add(dataset.regularization[0], "1_woman/a.png", "1_man/b.png")
    add(dataset.images, "alice/a.png")
    keys = 'trigger = "x"\ncaption_source = "tags"\nresolution = 512'
    for folder in (dataset.images / "alice", dataset.regularization[0] / "1_woman"):
        (folder / "folder.toml").write_text(keys)
    priors = find_regularization_images(dataset)
    what = "trigger and caption_source have no effect on regularization images"
    assert unused_entries(dataset.regularization[0], priors) == {"1_woman/folder.toml": what}
    assert unused_entries(dataset.images, find_images(dataset.images)) == {}


JSON_LINES = "".join(
    json.dumps(entry, ensure_ascii=False) + "\n"
    for entry in (
        {"file_name": "a.png", "text": "alice, smile"},
        {"file_name": "3_sub\\b.png", "text": 'a "quoted", text\nin two lines'},
        {"text": "niña 年", "file_name": "c.png", "width": 5},
        {"file_name": "d.png", "text": None},
    )
)
CSV = (
    'file_name,text,width\r\na.png,"alice, smile",5\r\n3_sub/b.png,"a ""quoted"", text\nin two lines",5\r\n'
    "c.png,niña 年,5\r\nd.png,,5\r\n"
)


@pytest.mark.parametrize(
    ("name", "content"), [("metadata.jsonl", JSON_LINES), ("metadata.csv", CSV), ("metadata.csv", "\ufeff" + CSV)]
)
def test_lists_of_captions_in_both_forms_of_hugging_face(dataset, name, content):
    (dataset.images / name).write_bytes(content.encode())
    assert read_caption_list(dataset.images) == {
        dataset.images / "a.png": "alice, smile",
        dataset.images / "3_sub/b.png": 'a "quoted", text\nin two lines',
        dataset.images / "c.png": "niña 年",
    }


def test_a_file_beside_the_image_counts_more_than_a_list_and_the_nearest_list_most(dataset):
    add(dataset.images, "a.png", "2_sub/b.png", "c.png")
    (dataset.images / "a.txt").write_text("mine")
    lines = [{"file_name": name, "text": f"top {name}"} for name in ("a.png", "2_sub/b.png", "c.png", "gone.png")]
    (dataset.images / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (dataset.images / "2_sub" / "metadata.csv").write_text("file_name,text\nb.png,near\n")
    found = {name_in(dataset.images, image.path): image for image in find_images(dataset.images)}
    assert {name: image.listed_caption for name, image in found.items()} == {
        "2_sub/b.png": "near",
        "a.png": "top a.png",
        "c.png": "top c.png",
    }
    assert [path.name for path in found["a.png"].captions] == ["a.txt"]
    assert unused_entries(dataset.images, find_images(dataset.images)) == {
        "metadata.jsonl": "lists images that are not in the data set: 1 (gone.png)"
    }


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "x"}\n{"file_name"', "line 2: must have a file_name and a text"),
        ("metadata.jsonl", b"[]", "line 1: must have a file_name and a text"),
        ("metadata.jsonl", b'{"text": "x"}', "line 1: has no file_name"),
        ("metadata.jsonl", rb'{"file_name": "a\ud800.png", "text": "x"}', "line 1: file_name has half of a character"),
        ("metadata.jsonl", rb'{"file_name": "a.png", "text": "x\ud83d"}', "line 1: text has half of a character"),
        (
            "metadata.jsonl",
            b'{"file_name": "a.png", "caption": "x"}',
            "line 1: has no text; rename to text what holds the caption, one of caption",
        ),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": ["x"]}', "line 1: text must be a text"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "x\\u0000"}', "without control characters"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "' + b"x" * 61441 + b'"}', "of at most 60 KiB"),
        ("metadata.jsonl", b'{"file_name": "../a.png", "text": "x"}', "must be a path below the folder of the file"),
        ("metadata.jsonl", b'{"file_name": "/a.png", "text": "x"}', "must be a path below the folder of the file"),
        (
            "metadata.jsonl",
            b'{"file_name": "a.png", "text": "x"}\n{"file_name": "a.png", "text": "y"}',
            "line 2: a.png is listed a",
        ),
        ("metadata.jsonl", "{}".encode("utf-16"), "is not UTF-8; save it as UTF-8"),
        ("metadata.csv", b"file_name,text\na.png\n", "line 2: must have a file_name and a text"),
        ("metadata.csv", b"file_name,text\na.png,x,y\n", "line 2: must have a file_name and a text"),
        ("metadata.csv", b"name,text\na.png,x\n", "line 2: has no file_name"),
        ("metadata.csv", b'file_name,text\na.png,"x\n', "must have a file_name and a text"),
    ],
)
def test_a_list_of_captions_that_cannot_be_used_is_named_with_its_line(dataset, name, content, line):
    (dataset.images / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_caption_list(dataset.images)
    assert line in str(caught.value)
    assert str(caught.value).startswith(str(dataset.images / name))


def test_two_lists_in_one_folder_are_refused(dataset):
    for name in ("metadata.jsonl", "metadata.csv"):
        (dataset.images / name).write_text("")
    with pytest.raises(DataError, match=r"has both metadata\.jsonl and metadata\.csv; keep one"):
        read_caption_list(dataset.images)


def test_the_table_has_a_line_for_each_folder_and_for_what_is_not_used(dataset):
    add(dataset.images, "top.png", "alice/a.png", "alice/a-masklabel.png", "alice/b.png", "0_old/d.png", "other/f.png")
    add(dataset.regularization[0], "1_woman/r.png")
    (dataset.images / "alice" / "folder.toml").write_text('repeats = 2\ntrigger = "alice"')
    (dataset.images / "alice" / "a.caption").write_text("alice")
    (dataset.images / "metadata.parquet").write_bytes(b"PAR1")
    dataset.exclusions.write_text("alice/b.png")
    dataset.records.mkdir()
    dataset.audit.write_text(json.dumps({"flagged": {"top.png": {}}}))
    assert [line.split() for line in table_of(dataset).splitlines()[1:5]] == [
        ["images", "1", "0", "0", "1", "sks", "1", "-"],
        ["images/0_old", "1", "0", "0", "0", "sks", "-", "1"],
        ["images/alice", "2", "1", "1", "2", "alice", "-", "1"],
        ["regularization/1_woman", "1", "1", "0", "1", "woman", "-", "-"],
    ]
    assert table_of(dataset).splitlines()[5:] == [
        "not used: images/metadata.parquet (captions in Parquet; save them as metadata.jsonl to use them)",
        "not used: images/other (a folder with images; call it N_name for N repeats to use it)",
    ]
