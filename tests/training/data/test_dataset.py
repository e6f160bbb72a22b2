"""Real photographs become examples, or one list of everything that is wrong with them."""

import errno
import hashlib
import os
from pathlib import Path

import pytest
from PIL import Image

from common.dataset_layout import DatasetFolder, find_images
from common.errors import DataError
from common.files import sha256_of, write_json
from common.unused_entries import unused_entries
from training.data.dataset import flagged_images, other_entries
from training.data.examples import read_examples

ORIENTATION = 0x0112


def oriented(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = value
    return exif


def test_every_format_and_n_name_folder(stage):
    stage.add("astronaut", "b.png", "sks, astronaut")
    stage.add("coffee", "A.JPG", "sks, coffee")
    stage.add("chelsea", "3_cats/c.webp", "sks, cat")
    stage.add("rocket", "d.bmp", "sks, rocket")
    stage.add("rocket", "12_more rockets/e.jpeg", "sks, rocket, day")
    stage.add("coffee", "0_unused/f.png", None)
    stage.add("coffee", "elsewhere/g.png", None)
    stage.add("coffee", ".hidden.png", None)
    examples, problems = read_examples(stage.images, workers=2)
    assert problems == []
    assert [(e.name, e.caption, e.width, e.height, e.repeats) for e in examples] == [
        ("12_more rockets/e.jpeg", "sks, rocket, day", 640, 427, 12),
        ("3_cats/c.webp", "sks, cat", 451, 300, 3),
        ("A.JPG", "sks, coffee", 600, 400, 1),
        ("b.png", "sks, astronaut", 512, 512, 1),
        ("d.bmp", "sks, rocket", 640, 427, 1),
    ]
    for example in examples:
        assert example.sha256 == hashlib.sha256(example.path.read_bytes()).hexdigest()
    assert read_examples(stage.images, workers=0) == (examples, [])


@pytest.mark.parametrize(("orientation", "size"), [(1, (451, 300)), (3, (451, 300)), (6, (300, 451)), (8, (300, 451))])
def test_size_is_that_of_the_upright_image(stage, orientation, size):
    stage.add("chelsea", "cat.jpg", exif=oriented(orientation))
    (example,), _ = read_examples(stage.images, workers=0)
    assert (example.width, example.height) == size


@pytest.mark.parametrize(
    ("content", "caption"),
    [
        (b"sks, smile", "sks, smile"),
        (b"\xef\xbb\xbfsks, smile\r\n", "sks, smile"),
        ("sks, niña,\n 年\n".encode(), "sks, niña, 年"),
        (b"", ""),
    ],
)
def test_caption_is_its_text_in_one_line(stage, content, caption):
    stage.add("coffee").with_suffix(".txt").write_bytes(content)
    assert read_examples(stage.images, workers=0)[0][0].caption == caption


def test_magic_bytes_decide_the_format_and_not_the_suffix(stage):
    stage.add("coffee", "really-a-jpeg.png", format="JPEG")
    assert len(read_examples(stage.images, workers=0)[0]) == 1


def damage(stage) -> int:
    """Fill the data set with good images and one of everything that can be wrong; return how many are bad."""
    stage.add("astronaut", "good.png")
    cut = stage.add("rocket", "cut_off.png")
    cut.write_bytes(cut.read_bytes()[:20000])
    stage.add("rocket", "text.png").write_text("this is not an image")
    stage.add("rocket", "empty.webp").write_bytes(b"")
    stage.add("rocket", "animation.png", format="GIF")
    stage.photographs["astronaut"].resize((255, 400)).save(stage.images / "small.png")
    (stage.images / "small.txt").write_text("sks")
    stage.add("coffee", "good.jpg")
    both = stage.add("chelsea", "5_cats/both.png", caption=None)
    both.write_bytes(both.read_bytes()[:5000])
    return 7


PROBLEMS = (
    "cut_off.png: cannot be decoded: ",
    "text.png: is not a PNG, JPEG, WebP, BMP, TIFF, HEIC or AVIF image; replace or remove it",
    "empty.webp: is empty; replace or remove it",
    "animation.png: is a GIF, which is not read (save it as PNG or JPEG); replace or remove it",
    "small.png: 255x400 is too small; the shorter side must have at least 256 px",
    "good.png: would share its caption with good.jpg; rename one of the two",
    "5_cats/both.png: cannot be decoded: ",
)


def test_images_that_cannot_be_trained_on_are_left_out_and_named(stage):
    bad = damage(stage)
    examples, lines = read_examples(stage.images, workers=2)
    assert [example.name for example in examples] == ["good.jpg"]
    assert len(lines) == len(PROBLEMS) == bad
    for problem in PROBLEMS:
        assert any(line.startswith(problem) for line in lines), problem


def test_training_goes_on_with_the_other_images_and_ends_with_1(stage):
    bad = damage(stage)
    for _ in range(2):  # trained, and then found finished
        ended = stage.run()
        assert ended.returncode == 1
        assert ended.stderr == f"train_lora: {bad} images cannot be trained on and are left out; they are listed above\n"
        assert f"{stage.images}: {bad} images cannot be trained on and are left out:\n" in ended.stdout
        assert all(problem in ended.stdout for problem in PROBLEMS)
        assert stage.lora.exists()
    checked = stage.run("--check")
    assert (checked.returncode, checked.stderr) == (1, ended.stderr)


def test_nothing_is_trained_while_images_have_no_caption(stage):
    damage(stage)
    stage.add("astronaut", "new.png", caption=None)
    ended = stage.run()
    assert ended.returncode == 3
    assert ended.stderr == (
        f"train_lora: {stage.images}: 1 of the 9 images have no caption (new.png); caption them and train with: "
        "scripts/run.sh --caption --train\n"
    )
    assert set(stage.files()) <= {"state/.lock"}


def test_only_images_that_cannot_be_trained_on_is_an_error(stage):
    stage.add("coffee", "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of the 1 images can be trained on:\n  - a.png: is empty"):
        read_examples(stage.images, workers=0)


def test_an_image_without_read_permission_is_in_the_list_and_not_a_disk_error(stage, monkeypatch):
    stage.add("coffee", "mine.png")
    stage.add("chelsea", "cat.png")
    plain_open = Path.open

    def open_some(path, *how, **more):
        if path.name == "mine.png":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return plain_open(path, *how, **more)

    monkeypatch.setattr(Path, "open", open_some)  # root may read everything
    examples, problems = read_examples(stage.images, workers=0)
    assert [example.name for example in examples] == ["cat.png"]
    assert problems == ["mine.png: cannot be read: Permission denied; replace or remove it"]


def test_images_of_256_px_are_accepted(stage):
    stage.photographs["astronaut"].resize((256, 256)).save(stage.images / "a.png")
    (stage.images / "a.txt").write_text("sks")
    assert len(read_examples(stage.images, workers=0)[0]) == 1


def test_a_missing_or_empty_folder_reports_what_to_do(stage):
    for folder in (stage.images, stage.images / "absent"):
        with pytest.raises(DataError, match=r"no images .* run the collect stage") as error:
            read_examples(folder, workers=0)
        assert error.value.exit_code == 3


def test_files_among_the_images_that_are_ignored_are_named(stage):
    stage.add("coffee", "cup.png")
    stage.add("coffee", "2_cups/cup.png")
    stage.add("coffee", "holiday/cup.png")
    (stage.images / "cup.gif").write_bytes(b"GIF89a")
    (stage.images / "notes.txt").write_text("notes")
    (stage.images / ".DS_Store").touch()
    output = stage.run("--check").stdout
    assert (
        "ignored, because neither image, caption of an image, nor N_name folder: cup.gif (a GIF; save it as PNG or JPEG to use "
        "it), holiday (a folder with images; call it N_name for N repeats to use it), notes.txt\n"
    ) in output


def flag(stage, **digests: str) -> None:
    """Write an audit that flags these images, as the caption stage does."""
    found = {f"{name}.png": {"flaws": {"blurred": "1.2", "small": "300x200"}, "sha256": digest} for name, digest in digests.items()}
    write_json(DatasetFolder(stage.dataset).audit, {"resolution": 64, "flagged": found})


def test_flagged_images_are_skipped_if_enabled_and_unchanged(stage):
    paths = {name: stage.add(name) for name in ("astronaut", "coffee", "chelsea")}
    flag(stage, coffee=sha256_of(paths["coffee"]), chelsea="of an earlier image", gone="0")
    assert flagged_images(DatasetFolder(stage.dataset), find_images(stage.images), 64) == {"coffee.png": "blurred, small"}
    output = stage.run("--check", SKIP_FLAGGED=1).stdout
    assert "skipping flagged images: coffee.png (blurred, small)" in output
    assert [example.name for example in read_examples(stage.images, 0, {"coffee.png"})[0]] == ["astronaut.png", "chelsea.png"]
    assert "skipping" not in stage.run("--check").stdout


def test_a_data_set_that_is_all_flagged_or_was_never_audited(stage):
    path = stage.add("coffee")
    never = stage.run(SKIP_FLAGGED=1)
    assert never.returncode == 3
    assert "audit.json is missing or damaged; run the caption stage first" in never.stderr
    flag(stage, coffee=sha256_of(path))
    of_another = stage.run(SKIP_FLAGGED=1, RESOLUTION=128)
    assert of_another.returncode == 3
    assert "was made for 64 px; run the caption stage again with RESOLUTION=128" in of_another.stderr
    nothing_left = stage.run(SKIP_FLAGGED=1)
    assert nothing_left.returncode == 3
    assert "all 1 images are flagged or excluded; set SKIP_FLAGGED=0, or shorten exclude.txt" in nothing_left.stderr


def test_captions_with_other_suffixes_are_read(stage):
    stage.add("coffee", "A.JPG", None)
    (stage.images / "A.TXT").write_text("sks, coffee")
    stage.add("chelsea", "b.png", None)
    (stage.images / "b.caption").write_text("sks, cat")
    stage.add("rocket", "c.png", "sks, rocket")
    (stage.images / "c.caption").write_text("another text")
    assert [example.caption for example in read_examples(stage.images, workers=0)[0]] == ["sks, coffee", "sks, cat", "sks, rocket"]
    found = find_images(stage.images)
    assert other_entries(stage.images, found, unused_entries(stage.images, found)) == ["c.caption"]


def test_captions_that_cannot_be_used_are_in_the_list(stage, tmp_path):
    for name in ("pipe", "link", "long", "utf16"):
        stage.add("coffee", f"{name}.png", None)
    os.mkfifo(stage.images / "pipe.txt")
    (tmp_path / "secret").write_text("secret")
    (stage.images / "link.txt").symlink_to(tmp_path / "secret")
    (stage.images / "long.txt").write_bytes(b"a" * 65537)
    (stage.images / "utf16.txt").write_bytes("sks".encode("utf-16-be"))
    stage.add("coffee", "latin1.jpg").with_suffix(".txt").write_bytes("sks, niña".encode("latin-1"))
    stage.add("coffee", "3_photos/utf16.jpg").with_suffix(".txt").write_bytes("sks".encode("utf-16"))
    stage.add("coffee", "fine.png")
    with pytest.raises(DataError) as refused:
        read_examples(stage.images, workers=2)
    assert str(refused.value) == (
        f"{stage.images}: 6 of 7 captions cannot be used:\n"
        "  - 3_photos/utf16.txt is not UTF-8; save it as UTF-8 (it is UTF-16)\n"
        "  - latin1.txt is not UTF-8; save it as UTF-8\n"
        "  - link.txt is a link to a file outside the data set; replace it by a copy of that file\n"
        "  - long.txt is larger than the 64 KiB of a caption; shorten or remove it\n"
        "  - pipe.txt is not a file; rename it\n"
        "  - utf16.txt is not UTF-8; save it as UTF-8 (it is UTF-16)"
    )


def test_excluded_images_are_not_read(stage):
    stage.add("astronaut")
    stage.add("coffee", "5_cups/coffee.png", None)  # without a caption: training would refuse it
    (stage.dataset / "exclude.txt").write_text("5_cups/coffee.png\ngone.png\n")
    done = stage.run("--check")
    assert done.returncode == 0
    assert "excluded by exclude.txt: 1 images (5_cups/coffee.png)" in done.stdout
    assert "exclude.txt names images that are not in the data set: gone.png" in done.stdout
    (stage.dataset / "exclude.txt").write_text("5_cups/coffee.png\nastronaut.png\n")
    none_left = stage.run()
    assert none_left.returncode == 3
    assert "all 2 images are flagged or excluded; set SKIP_FLAGGED=0, or shorten exclude.txt" in none_left.stderr
