"""Reading captions: what is refused and why, how lines are joined, and when the trigger word is in a caption."""

import json
import os
import time
import tracemalloc
import unicodedata

import pytest

from common.captions import (
    MAX_CAPTION_BYTES,
    UnusableCaptionError,
    has_trigger,
    has_weights,
    in_lines,
    in_one_line,
    leads_with_trigger,
    ordinary_trigger,
    read_caption,
    replace_trigger,
    tagger_vocabulary,
)
from common.settings import REPOSITORY

GOLDEN = json.loads((REPOSITORY / "tests" / "data" / "captions" / "captions.json").read_text(encoding="utf-8"))


@pytest.fixture
def caption(tmp_path):
    folder = tmp_path / "dataset" / "images"
    folder.mkdir(parents=True)
    return folder / "a.txt"


def read(caption) -> str:
    return read_caption(caption, caption.parent.parent)


@pytest.mark.parametrize("golden", GOLDEN.values(), ids=GOLDEN)
def test_files_are_read_as_one_caption_or_as_one_per_line(caption, golden):
    caption.write_text(golden["file"], encoding="utf-8", newline="")
    text = read(caption)
    assert in_one_line(text) == golden["one_caption"]
    assert in_lines(text) == "\n".join(golden["captions_per_line"])
    assert has_weights(text) is golden["has_weights"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("smile, (long hair:1.2)", True),
        ("(2girls:1), smile", True),
        ("((smile:1.2)), hat", True),
        ("((smile, (hat)))", True),
        ("(ohwx2:1.1)", True),
        ("(smile:-.5)", True),
        ("saber_(fate), 2b_(nier:automata), smile", False),
        ("akira_(chrono:2)", False),
        ("name_((series))", False),
        ("name_(series_(2019))", False),
        ("saber \\(fate:2\\)", False),
        ("a photo (at 12:30), format (16:9), verse (john 3:16)", False),
        ("(:3), >:((, :((", False),
        ("(chapter:12)", False),
        ("roots (hair), (o)_(o)", False),
    ],
)
def test_weights_are_told_from_other_brackets(text, expected):
    assert has_weights(text) is expected


def refusal(caption) -> str:
    with pytest.raises(UnusableCaptionError) as refused:
        read(caption)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", ""),
        ("sks, niña, 猫\r\n".encode(), "sks, niña, 猫\r\n"),
        (b"\xef\xbb\xbfsks", "sks"),
        (b"\xef\xbb\xbf\xef\xbb\xbfsks", "sks"),
        (b"sks\tsmile\x0b\x0c", "sks\tsmile\x0b\x0c"),
        (b"a" * MAX_CAPTION_BYTES, "a" * MAX_CAPTION_BYTES),
    ],
)
def test_text_is_read_as_it_was_written(caption, content, text):
    caption.write_bytes(content)
    assert read(caption) == text


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", ["sks, smile, red hat", "sks, 猫, 赤い帽子", "sks\n1girl\nsmile"])
def test_utf16_and_utf32_are_recognised_with_and_without_a_mark(caption, encoding, text):
    caption.write_bytes(text.encode(encoding))
    assert refusal(caption) == f"is not UTF-8; save it as UTF-8 (it is {encoding[:6].upper()})"


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1252", "sks, niña, café"),
        ("latin-1", "sks, grüner Hut"),
        ("shift_jis", "sks, 猫, 帽子"),
        ("euc_jp", "sks, 猫, 帽子"),
        ("gbk", "sks, 女孩, 微笑"),
        ("gb18030", "一个戴着红帽子的女人走在海滩上"),
        ("big5", "sks, 女孩"),
        ("euc_kr", "모자를 쓴 여자"),
        ("cp1251", "девушка в красной шляпе"),
        ("koi8-r", "девушка в красной шляпе"),
        ("mac_roman", "sks, café"),
    ],
)
def test_other_encodings_are_refused_and_never_guessed(caption, encoding, text):
    caption.write_bytes(text.encode(encoding))
    assert refusal(caption) == "is not UTF-8; save it as UTF-8"


@pytest.mark.parametrize("content", ["sks, 猫".encode("iso2022_jp"), b"sks\x07", rb"{\rtf1\ansi sks, smile}", b"\x7fELF"])
def test_what_is_not_plain_text_is_refused(caption, content):
    caption.write_bytes(content)
    assert refusal(caption) == "is not plain text; save it as plain text in UTF-8"


def test_a_caption_of_any_size_is_refused_before_it_is_read(caption):
    caption.write_bytes(b"a" * (MAX_CAPTION_BYTES + 1))
    assert refusal(caption) == "is larger than the 64 KiB of a caption; shorten or remove it"
    with caption.open("wb") as file:
        file.truncate(2**40)
    tracemalloc.start()
    assert "is larger than the 64 KiB" in refusal(caption)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.timeout(10)
def test_what_is_not_a_regular_file_is_refused_and_never_waited_for(caption):
    os.mkfifo(caption)
    assert refusal(caption) == "is not a file; rename it"
    caption.unlink()
    caption.mkdir()
    assert refusal(caption) == "is not a file; rename it"
    caption.rmdir()
    caption.symlink_to(caption.name)
    assert refusal(caption).startswith("cannot be read: ")
    caption.unlink()
    caption.symlink_to("absent.txt")
    assert refusal(caption) == "is a link to a file that does not exist; restore that file or remove the link"
    caption.unlink()
    with pytest.raises(FileNotFoundError):
        read(caption)


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/stdin", "/proc/self/environ", "/etc/passwd", "../../secret.txt", "b.txt"])
def test_a_link_is_followed_within_the_data_set_only(caption, target):
    (caption.parent.parent.parent / "secret.txt").write_text("secret")
    (caption.parent / "b.txt").symlink_to("/etc/passwd")
    caption.symlink_to(target)
    assert refusal(caption) == "is a link to a file outside the data set; replace it by a copy of that file"


def test_links_within_the_data_set_and_linked_folders_are_followed(caption):
    dataset = caption.parent.parent
    (dataset / "common.txt").write_text("sks, smile")
    caption.symlink_to("../common.txt")
    assert read(caption) == "sks, smile"
    elsewhere = dataset.parent / "photos"
    elsewhere.mkdir()
    (elsewhere / "b.txt").write_text("sks, hat")
    (elsewhere / "c.txt").symlink_to("b.txt")
    (caption.parent / "3_photos").symlink_to(elsewhere)
    assert [read_caption(caption.parent / "3_photos" / name, dataset) for name in ("b.txt", "c.txt")] == ["sks, hat"] * 2


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("sks\n1girl\nsmile\nred hat\nlooking at viewer\ntree\n", "sks, 1girl, smile, red hat, looking at viewer, tree"),
        ("sks\r\n\r\n1girl\r\n", "sks, 1girl"),
        ("sks\r1girl", "sks, 1girl"),
        ("sks, 1girl,\nsmile ,\n hat\n, tree", "sks, 1girl, smile , hat , tree"),
        ("sks, 1girl\nsmile, hat", "sks, 1girl, smile, hat"),
        ("sks\nA woman in a red dress walks along the\nbeach at noon.\nShe smiles", None),
        ("A woman in a red dress walks along the\nbeach", "A woman in a red dress walks along the beach"),
        ("sks.\n1girl", "sks. 1girl"),
        ("  sks,\t1girl \u00a0 smile  ", "sks, 1girl smile"),
        ("", ""),
        (" \n\n", ""),
    ],
)
def test_lines_of_tags_are_separated_by_commas_and_lines_of_prose_by_spaces(text, line):
    expected = "sks, A woman in a red dress walks along the beach at noon. She smiles" if line is None else line
    assert in_one_line(text) == expected
    assert in_one_line(expected) == expected


@pytest.mark.parametrize(
    ("text", "trigger", "contains", "leads"),
    [
        ("sks, smile", "sks", True, True),
        ("Sks, smile", "sks", True, True),
        ("SKS woman, smile", "sks", True, True),
        ("sks, smile", "SKS", True, True),
        ("(sks:1.2), smile", "sks", True, True),
        ("sks's dog, tree", "sks", True, True),
        ("smile, Sks", "sks", True, False),
        ("a photo of SKS.", "sks", True, False),
        ("asks, tasks", "sks", False, False),
        ("sks_woman, smile", "sks", False, False),
        ("sks-like, smile", "sks", False, False),
        ("nyafyi woman, smile", "nyafyi_woman", True, True),
        ("Nyafyi_Woman, smile", "nyafyi woman", True, True),
        ("smile, nyafyi   woman", "nyafyi_woman", True, False),
        ("nyafyi, woman", "nyafyi_woman", False, False),
        (unicodedata.normalize("NFD", "Zoë, smile"), "zoë", True, True),
        ("zoë, smile", unicodedata.normalize("NFD", "zoë"), True, True),
        ("c++, smile", "C++", True, True),
        ("", "sks", False, False),
    ],
)
def test_the_trigger_is_a_word_of_its_own_in_any_case(text, trigger, contains, leads):
    assert (has_trigger(text, trigger), leads_with_trigger(text, trigger)) == (contains, leads)


@pytest.mark.parametrize("unit", ["a,", "a\n", "sks ", "sks\n", " ", "(", "-", "_", "a. ", "x", "sks_woman,"])
def test_the_longest_caption_takes_no_time(unit):
    text = (unit * MAX_CAPTION_BYTES)[:MAX_CAPTION_BYTES]
    started = time.process_time()
    in_one_line(text), has_trigger(text, "sks woman"), leads_with_trigger(text, "sks woman")
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("trigger", "reason"),
    [
        ("smile", "is an ordinary tag"),
        ("Red_Hat", "is an ordinary tag"),
        ("hatsune miku", "is an ordinary tag"),
        ("woman", "consists of ordinary words"),
        ("emma watson", "consists of ordinary words"),
        ("emma_watson", "consists of ordinary words"),
        ("sks", None),
        ("ohwx woman", None),
        ("nyafyi_woman", None),
        ("p3rs0n", None),
    ],
)
def test_a_trigger_that_means_something_already_is_warned_about(trigger, reason):
    """The ids are those of CLIP's own vocabulary."""
    ids = {"woman": 2308, "emma": 7445, "watson": 10016, "sks": 48136, "ohwx": 47993, "p": 335, "rs": 2500, "n": 333, "red": 736}
    vocabulary = {f"{word}</w>": number for word, number in ids.items()} | {f"filler {number}": number for number in range(49000)}
    warning = ordinary_trigger(trigger, {"smile", "red_hat", "hatsune_miku"}, vocabulary)
    assert warning is None if reason is None else f"{trigger!r} {reason}" in warning
    assert ordinary_trigger("woman", (), {"woman</w>": 1}) is None  # a vocabulary that is not CLIP's says nothing


def test_the_tags_of_the_taggers_that_captioned_the_data_set_are_known(tmp_path):
    for name, content in {"a": b"tag_id,name\n1,smile\n", "b": b"\xff\xfe", "c": b"", "d": b"tag_id\n1\n"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "selected_tags.csv").write_bytes(content)
    assert tagger_vocabulary(tmp_path) == {"smile"}
    assert tagger_vocabulary(tmp_path / "absent") == set()


def test_a_stray_zero_byte_is_not_taken_for_another_encoding(tmp_path):
    caption = tmp_path / "a.txt"
    caption.write_bytes(b"sks, a woman with a red hat\0 on a bench")
    with pytest.raises(UnusableCaptionError, match="is not plain text"):
        read_caption(caption, tmp_path)


@pytest.mark.parametrize(
    ("text", "replaced"),
    [
        ("sks, smile, a dog", "woman, smile, a dog"),
        ("a photo of SKS and sks_2", "a photo of woman and sks_2"),
        ("smile, a dog", "smile, a dog"),
        ("(sks:1.2), sks-like", "(woman:1.2), sks-like"),
    ],
)
def test_a_trigger_word_is_replaced_wherever_it_is_a_word_of_its_own(text, replaced):
    assert replace_trigger(text, "sks", "woman") == replaced


def test_trigger_words_of_several_words_and_odd_replacements():
    assert replace_trigger("my person, My  Person in town", "my_person", r"\1 old man") == r"\1 old man, \1 old man in town"
