"""Stores verified images in dataset/images/ and lists them in the manifest.

File names are made here: nothing that the server sends reaches the file system. The same bytes are never stored twice.
"""

import hashlib
import io
import re
import threading
import unicodedata
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from common.dataset_layout import DatasetFolder, find_images
from common.files import append_json_line, read_json_lines, sha256_of, write_bytes
from common.image_formats import IMAGE_FORMATS
from common.images import verify_download
from common.thumbnails import Thumbnails

UPLOAD_FORMATS = ("png", "jpeg", "webp")
_MAX_PREFIX_LENGTH = 40


@dataclass(frozen=True)
class DownloadedImage:
    """The bytes of an image that was decoded without errors."""

    content: bytes
    suffix: str
    size_px: tuple[int, int]
    """(width, height)"""
    sha256: str
    rgb: Image.Image = field(repr=False, compare=False)

    @classmethod
    def from_bytes(cls, content: bytes) -> "DownloadedImage":
        """Verify the image file `content`. Raises BrokenImageError unless it is a complete still image."""
        image = verify_download(content)
        return cls(content, IMAGE_FORMATS[image.format][0], image.rgb.size, hashlib.sha256(content).hexdigest(), image.rgb)

    @classmethod
    def for_upload(cls, content: bytes) -> "DownloadedImage":
        """The same for an image to upload: one in a format that ComfyUI may not read becomes a PNG. `sha256` stays that of
        `content`."""
        image = verify_download(content)
        sha256 = hashlib.sha256(content).hexdigest()
        if image.format not in UPLOAD_FORMATS:
            stream = io.BytesIO()
            image.rgb.save(stream, "PNG")
            return cls(stream.getvalue(), ".png", image.rgb.size, sha256, image.rgb)
        return cls(content, IMAGE_FORMATS[image.format][0], image.rgb.size, sha256, image.rgb)


class ImageStore:
    """dataset/images/ and its manifest. Threads that share it hold `lock` around the calls that belong together."""

    def __init__(self, folder: DatasetFolder):
        self.lock = threading.Lock()
        self._folder = folder
        folder.remove_leftovers()
        # A damaged line is ignored.
        self._listed = {
            line["sha256"]: line
            for line in read_json_lines(folder.manifest)
            if isinstance(line.get("file"), str) and isinstance(line.get("sha256"), str)
        }

    def count_missing(self) -> int:
        """The number of images that the manifest lists and the folder no longer has."""
        return sum(not (self._folder.root / line["file"]).exists() for line in self._listed.values())

    def manifest_line(self, image: DownloadedImage, prefix: str, details: dict[str, Any]) -> dict[str, Any]:
        """The line that `image` gets in the manifest: its file, hash and size, then `details`."""
        name = f"{safe_prefix(prefix)}_{image.sha256[:12]}{image.suffix}"
        if (self._folder.images / name).exists():
            name = f"{safe_prefix(prefix)}_{image.sha256}{image.suffix}"
        return {"file": f"images/{name}", "sha256": image.sha256, "size_px": list(image.size_px), **details}

    def contains(self, line: dict[str, Any]) -> bool:
        """Whether the image of `line` is stored. A file with these bytes that the manifest does not list gets `line`."""
        if line["sha256"] in self._listed:
            return True
        path = self._unlisted.pop(line["sha256"], None)
        if path is None:
            return False
        self._append({**line, "file": path.relative_to(self._folder.root).as_posix()})
        return True

    def put(self, image: DownloadedImage, line: dict[str, Any]) -> bool:
        """Store the image, then its line and its thumbnail. Returns False if an image with the same bytes was stored before."""
        if self.contains(line):
            return False
        path = self._folder.root / line["file"]
        write_bytes(path, image.content)
        self._append(line)
        Thumbnails(self._folder.thumbnails).add(path, image.rgb)
        return True

    def _append(self, line: dict[str, Any]) -> None:
        append_json_line(self._folder.manifest, line)
        self._listed[line["sha256"]] = line

    @cached_property
    def _unlisted(self) -> dict[str, Path]:
        """SHA-256 -> path of the images in the folder that the manifest does not list: a run was killed after storing them."""
        listed = {line["file"] for line in self._listed.values()}
        paths = (image.path for image in find_images(self._folder.images))
        return {sha256_of(path): path for path in paths if path.relative_to(self._folder.root).as_posix() not in listed}


def safe_prefix(text: str) -> str:
    """`text` as the beginning of a file name: letters, digits, `-` and `_`, at most 40 of them, never empty."""
    words = re.sub(r"[^\w-]+", "_", unicodedata.normalize("NFC", text))
    return words.strip("_-")[:_MAX_PREFIX_LENGTH].strip("_-") or "picture"
