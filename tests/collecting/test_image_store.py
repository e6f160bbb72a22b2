"""Images are stored only if they are complete, and only once."""

import hashlib
import io
import os
import struct
import zlib

import pillow_heif
import pytest
from comfyui_workspace import png
from PIL import Image

from collecting.image_store import DownloadedImage, ImageStore, safe_prefix
from common.dataset_layout import DatasetFolder
from common.files import append_json_line, read_json_lines
from common.images import BrokenImageError
from common.thumbnails import Thumbnails

pillow_heif.register_heif_opener()


def encoded(kind: str, **options) -> bytes:
    content = io.BytesIO()
    Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 50).convert("RGB").save(content, kind, **options)
    return content.getvalue()


def animation() -> bytes:
    content = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (0, 200)]
    frames[0].save(content, "WEBP", save_all=True, append_images=frames[1:])
    return content.getvalue()


def bomb() -> bytes:
    """A PNG that claims 60000 x 60000 pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")]
    framed = [struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


@pytest.fixture
def folder(tmp_path):
    return DatasetFolder(tmp_path / "dataset")


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [("PNG", ".png"), ("JPEG", ".jpg"), ("MPO", ".jpg"), ("WEBP", ".webp"), ("AVIF", ".avif"), ("HEIF", ".heic"), ("TIFF", ".tif")],
)
def test_complete_images_are_accepted_and_get_the_suffix_of_their_format(kind, suffix):
    image = DownloadedImage.from_bytes(encoded(kind))
    assert (image.suffix, image.size_px) == (suffix, (40, 30))


def test_face_in_a_format_that_comfyui_may_not_read_is_uploaded_as_png():
    """Under the hash of the file that the user chose, which is part of what identifies a job."""
    for kind, suffix in (("JPEG", ".jpg"), ("MPO", ".jpg"), ("HEIF", ".png"), ("AVIF", ".png"), ("TIFF", ".png")):
        content = encoded(kind, quality=90)
        image = DownloadedImage.for_upload(content)
        assert (image.suffix, image.sha256) == (suffix, hashlib.sha256(content).hexdigest())
        assert (image.content == content) == (suffix == ".jpg")
        assert DownloadedImage.from_bytes(image.content).size_px == (40, 30)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_truncated_images_are_refused(kind, share):
    content = encoded(kind)
    with pytest.raises(BrokenImageError):
        DownloadedImage.from_bytes(content[: int(len(content) * share)])


def test_png_without_its_last_bytes_is_refused():
    with pytest.raises(BrokenImageError, match="cut off"):
        DownloadedImage.from_bytes(png()[:-1])


def test_damaged_png_is_refused():
    content = bytearray(encoded("PNG"))
    content[len(content) // 2] ^= 0xFF
    with pytest.raises(BrokenImageError):
        DownloadedImage.from_bytes(bytes(content))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"not an image", "is not a PNG, JPEG, WebP, BMP, TIFF, HEIC or AVIF image"),
        (b"<html>log in</html>", "is not a PNG, JPEG, WebP, BMP, TIFF, HEIC or AVIF image"),
        (encoded("GIF"), "is a GIF"),
        (animation(), "animation"),
        (bomb(), "pixels"),
    ],
)
def test_anything_but_a_still_image_is_refused(content, words):
    with pytest.raises(BrokenImageError, match=words):
        DownloadedImage.from_bytes(content)


def test_image_and_its_manifest_line_are_stored_once(folder):
    store, image = ImageStore(folder), DownloadedImage.from_bytes(png())
    line = store.manifest_line(image, "smile", {"node": "9"})
    assert store.put(image, line) is True
    assert store.put(image, store.manifest_line(image, "other", {"node": "10"})) is False
    assert ImageStore(folder).put(image, store.manifest_line(image, "again", {"node": "9"})) is False
    assert [path.name for path in folder.images.iterdir()] == [f"smile_{image.sha256[:12]}.png"]
    assert read_json_lines(folder.manifest) == [line]
    assert line == {"file": f"images/smile_{image.sha256[:12]}.png", "sha256": image.sha256, "size_px": [24, 32], "node": "9"}
    assert (folder.root / line["file"]).read_bytes() == png()


def test_the_page_need_not_decode_an_image_that_was_downloaded(folder):
    store, image = ImageStore(folder), DownloadedImage.from_bytes(png())
    line = store.manifest_line(image, "smile", {})
    store.put(image, line)
    path = folder.root / line["file"]
    expected, status = Thumbnails(folder.root / "other").of(path), path.stat()
    path.write_bytes(b" " * status.st_size)  # cannot be decoded any more
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert Thumbnails(folder.thumbnails).of(path) == expected != ""


def test_unlisted_file_gets_its_manifest_line_and_is_not_stored_twice(folder):
    folder.images.mkdir(parents=True)
    (folder.images / "killed_in_between.png").write_bytes(png())
    store, image = ImageStore(folder), DownloadedImage.from_bytes(png())
    assert store.put(image, store.manifest_line(image, "smile", {"node": "9"})) is False
    assert [line["file"] for line in read_json_lines(folder.manifest)] == ["images/killed_in_between.png"]
    assert [path.name for path in folder.images.iterdir()] == ["killed_in_between.png"]


def test_deleted_image_is_not_stored_again(folder):
    store, image = ImageStore(folder), DownloadedImage.from_bytes(png())
    line = store.manifest_line(image, "smile", {})
    store.put(image, line)
    (folder.root / line["file"]).unlink()
    again = ImageStore(folder)
    assert again.put(image, line) is False
    assert again.count_missing() == 1
    assert list(folder.images.iterdir()) == []


def test_file_of_the_user_is_never_overwritten(folder):
    image = DownloadedImage.from_bytes(png())
    folder.images.mkdir(parents=True)
    taken = folder.images / f"smile_{image.sha256[:12]}.png"
    taken.write_bytes(png((0, 0, 0)))
    store = ImageStore(folder)
    assert store.put(image, store.manifest_line(image, "smile", {})) is True
    assert taken.read_bytes() == png((0, 0, 0))
    assert len(list(folder.images.iterdir())) == 2


def test_old_partial_files_are_removed_and_new_ones_kept(folder):
    folder.images.mkdir(parents=True)
    old, fresh = folder.images / ".old.part", folder.images / ".fresh.part"
    for path in (old, fresh):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    ImageStore(folder)
    assert (old.exists(), fresh.exists()) == (False, True)


def test_truncated_manifest_line_does_not_hide_the_next(folder):
    append_json_line(folder.manifest, {"sha256": "0", "file": "images/a.png"})
    with folder.manifest.open("a") as manifest:
        manifest.write('{"sha256": "1", "fi')
    store, image = ImageStore(folder), DownloadedImage.from_bytes(png())
    store.put(image, store.manifest_line(image, "x", {}))
    assert [line["sha256"] for line in read_json_lines(folder.manifest)] == ["0", image.sha256]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("smile", "smile"),
        ("../../etc/passwd", "etc_passwd"),
        ("C:\\Users\\me", "C_Users_me"),
        (".hidden", "hidden"),
        ("a woman, smiling!", "a_woman_smiling"),
        ("猫 photo", "猫_photo"),
        ("\0\n/", "picture"),
        ("x" * 300, "x" * 40),
    ],
)
def test_file_name_prefix_is_made_safe(text, expected):
    assert safe_prefix(text) == expected
