"""Headers of `.safetensors` files, and files of other formats."""

import shutil

import pytest
from base_models import refusal

from training.models.base_model import find_base
from training.models.sdxl import Schedule


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"PK\x03\x04" + bytes(100), "is a pickle checkpoint"),
        (b"\x80\x02}q\x00(X\x05\x00\x00\x00" + bytes(100), "is a pickle checkpoint"),
        (b"GGUF" + bytes(100), "is a quantised GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        (b"<!doctype html><html></html>", "is a web page"),
        (b"", "is damaged"),
        (b"\x10", "is damaged"),
        (bytes(100), "is damaged"),
        (b"\x08" + bytes(7) + b'{"a": 1 ', "its header is damaged"),
        (b"\x08" + bytes(7) + b'{"a": 1}', "its header is damaged"),
    ],
)
def test_files_of_other_formats(tmp_path, content, problem):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    assert problem in refusal(file, tmp_path)


def test_the_content_of_a_file_counts_and_not_its_suffix(tiny_single_file, tmp_path):
    file = shutil.copy(tiny_single_file, tmp_path / "model.ckpt")
    assert find_base(str(file), tmp_path).schedule == Schedule()


@pytest.mark.parametrize("change", [lambda size: size - 1, lambda size: size // 2, lambda size: size + 1])
def test_file_of_another_size_than_its_header_describes(tiny_single_file, tmp_path, change):
    file = shutil.copy(tiny_single_file, tmp_path / "cut.safetensors")
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.truncate(change(size))
    assert f"it has {change(size)} bytes and its header describes {size}" in refusal(file, tmp_path)
