"""`exclude.txt` takes images out of the data set, however it was written."""

import os

import pytest

from common.dataset_layout import DatasetFolder, select_images
from common.errors import SettingsError, as_loracat_error

NAMES = ("a.png", "b #2.jpg", "5_face/a.png", "5_face/c.png", "12_more images/d.webp", "ñ.png")


@pytest.fixture
def folder(tmp_path) -> DatasetFolder:
    folder = DatasetFolder(tmp_path)
    for name in NAMES:
        path = folder.images / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def excluded(folder: DatasetFolder, text: str | bytes) -> list[str]:
    folder.exclusions.write_bytes(text if isinstance(text, bytes) else text.encode())
    selection = select_images(folder)
    assert sorted([*selection.excluded, *(str(image.path.relative_to(folder.images)) for image in selection.images)]) == sorted(
        NAMES
    )
    return selection.excluded


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("# nothing yet\n\n   \n#\n", []),
        ("a.png\n", ["a.png"]),
        ("a.png", ["a.png"]),
        ("5_face/a.png\r\na.png\r\n", ["5_face/a.png", "a.png"]),
        ("c.png\ra.png\r", ["5_face/c.png", "a.png"]),
        ("\ufeffa.png\n", ["a.png"]),
        ("  a.png\t# blurred\n", ["a.png"]),
        ("b #2.jpg\n", ["b #2.jpg"]),
        ("b #2.jpg # blurred # twice\n", ["b #2.jpg"]),
        ("5_face\\a.png\n", ["5_face/a.png"]),
        (
            "./a.png\nimages/5_face/c.png\ndataset/images/12_more images/d.webp\n",
            ["12_more images/d.webp", "5_face/c.png", "a.png"],
        ),
        ("5_face/\n", ["5_face/a.png", "5_face/c.png"]),
        ('"12_more images/d.webp"\n', ["12_more images/d.webp"]),
        ("n\u0303.png\n", ["ñ.png"]),  # as macOS spells it
        ("a.png\na.png\n", ["a.png"]),
    ],
)
def test_ways_to_write_it(folder, text, names):
    assert excluded(folder, text) == names
    assert excluded(folder, text.encode("utf-16")) == names
    assert select_images(folder).unknown == []


def test_without_the_file_every_image_is_used(folder):
    selection = select_images(folder)
    assert len(selection.images) == len(NAMES)
    assert selection.notes() == ""


def test_unknown_names_are_reported_in_one_line(folder):
    assert excluded(folder, "A.PNG # gone\n\n.\na.txt\na.png\n\xff\n") == ["a.png"]
    lines = select_images(folder).notes().splitlines()
    assert lines == [
        "excluded by exclude.txt: 1 images (a.png)",
        "exclude.txt names images that are not in the data set: A.PNG, ., a.txt, ÿ",
    ]


def test_bytes_that_are_not_text_exclude_nothing(folder):
    assert excluded(folder, b"\xff\xfe\x00\n\xd8\x80\x00") == []
    assert excluded(folder, bytes(range(256))) == []


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_not_a_file_is_refused(tmp_path, make):
    folder = DatasetFolder(tmp_path)
    folder.images.mkdir()
    make(folder.exclusions)
    with pytest.raises(OSError, match=r"exclude\.txt") as refused:
        select_images(folder)
    assert isinstance(as_loracat_error(refused.value), SettingsError)
