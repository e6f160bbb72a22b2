"""Files that are complete or absent, and records that are only computed again if they are damaged."""

import json
import os
from pathlib import Path

import pytest

from common.dataset_layout import DatasetFolder
from common.errors import SettingsError, as_loracat_error
from common.files import read_cached_json, read_file, read_json_lines, sha256_of, write_cached_json

CONTENT = {"one": [1, 2.5, None], "two": {"text": "Zoë"}, "three": "x"}


def test_cached_records_are_read_back_and_those_of_the_first_version_are_trusted(tmp_path):
    file = tmp_path / "record.json"
    assert read_cached_json(file) == {}
    write_cached_json(file, CONTENT)
    assert read_cached_json(file) == CONTENT
    assert json.loads(file.read_text()).items() > CONTENT.items()
    file.write_text(json.dumps(CONTENT))
    assert read_cached_json(file) == CONTENT


def test_no_flipped_bit_changes_a_cached_record_unnoticed(tmp_path):
    file = tmp_path / "record.json"
    write_cached_json(file, CONTENT)
    content = file.read_bytes()
    for position in range(len(content)):
        for bit in (0, 4, 6):
            file.write_bytes(content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :])
            read = read_cached_json(file)
            read.pop(next((name for name in read if name not in CONTENT), ""), None)  # the checksum under a damaged name
            assert read in ({}, CONTENT), (position, bit)


@pytest.mark.parametrize("content", [b"", b"[]", b"[1]", b"5", b"null", b"{", b"\xff", b'{"checksum": 5}', b"[" * 100_000])
def test_what_is_not_a_record_is_empty(tmp_path, content):
    file = tmp_path / "record.json"
    file.write_bytes(content)
    assert read_cached_json(file) == {}


def test_leftovers_are_removed_in_every_folder_of_the_data_set(tmp_path):
    folder = DatasetFolder(tmp_path)
    tags = folder.tag_cache / "0123456789abcdef"
    folders = (folder.root, folder.images, folder.images / "3_extra", folder.records, tags)
    for each in folders:
        each.mkdir(parents=True, exist_ok=True)
        for name in (".abcd1234.part", ".new_1234.part", "user.part", ".hidden.png"):
            (each / name).touch()
        os.utime(each / ".abcd1234.part", (1, 1))
    folder.remove_leftovers()
    for each in folders:
        assert {path.name for path in each.iterdir() if path.is_file()} == {".new_1234.part", "user.part", ".hidden.png"}


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_only_regular_files_are_read(tmp_path, make):
    """A pipe would be waited for, a device has no end."""
    make(tmp_path / "x")
    for read in (read_file, sha256_of, read_json_lines):
        with pytest.raises(OSError, match=r"Is a directory|Not a regular file") as refused:
            read(tmp_path / "x")
        assert str(refused.value.filename) == str(tmp_path / "x")
        assert isinstance(as_loracat_error(refused.value), SettingsError)
    assert read_cached_json(tmp_path / "x") == {}
    assert read_file(Path(os.devnull)) == b""
