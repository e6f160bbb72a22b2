"""Images on the disk and downloaded images are held to the same limits, with the same words."""

import io

import pytest
from PIL import Image

from common.images import DOWNLOAD_SUFFIXES, BrokenImageError, open_rgb, verify_download


def encoded(image: Image.Image, image_format: str) -> bytes:
    content = io.BytesIO()
    image.save(content, image_format)
    return content.getvalue()


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((16_384, 8), None),
        ((16_385, 8), "is longer than 16,384 pixels"),
        ((8, 16_385), "is longer than 16,384 pixels"),
        ((10_000, 8_950), "has more than 89,478,485 pixels"),
    ],
)
def test_both_ways_have_the_same_limits(tmp_path, size, message):
    content = encoded(Image.new("1", size), "PNG")
    (tmp_path / "a.png").write_bytes(content)
    for decode in (lambda: open_rgb(tmp_path / "a.png").size, lambda: verify_download(content)[1]):
        if message is None:
            assert decode() == size
        else:
            with pytest.raises(BrokenImageError, match=message):
                decode()


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp", "bmp"])
def test_formats(tmp_path, image_format):
    content = encoded(Image.new("RGB", (40, 30), "red"), image_format)
    (tmp_path / "a.image").write_bytes(content)
    assert open_rgb(tmp_path / "a.image").size == (40, 30)
    if image_format == "bmp":
        with pytest.raises(BrokenImageError, match="is not a PNG, JPEG or WebP image"):
            verify_download(content)
    else:
        assert verify_download(content) == (image_format, (40, 30))
    assert DOWNLOAD_SUFFIXES == (".png", ".jpg", ".jpeg", ".webp")


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_truncated_files_are_refused_by_both(tmp_path, image_format):
    content = encoded(Image.effect_noise((200, 150), 60).convert("RGB"), image_format)
    content = content[: len(content) // 2]
    (tmp_path / "a.image").write_bytes(content)
    with pytest.raises(BrokenImageError, match="cannot be decoded"):
        open_rgb(tmp_path / "a.image")
    with pytest.raises(BrokenImageError, match=r"cannot be decoded|is cut off"):
        verify_download(content)


def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path):
    with pytest.raises(BrokenImageError, match="cannot be read: No such file or directory"):
        open_rgb(tmp_path / "missing.png")
    with pytest.raises(BrokenImageError, match="cannot be read: Is a directory"):
        open_rgb(tmp_path)
