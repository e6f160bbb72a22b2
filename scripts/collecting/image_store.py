"""Bytes from /view -> a verified image in dataset/images/ with its line in the manifest.

A name is always ours; nothing that the server says reaches the file system. The same bytes are never stored twice.
"""

import hashlib
import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from common.dataset_layout import IMAGE_FORMATS, DatasetFolder, find_images
from common.files import append_json_line, read_json_lines, remove_partial_files, sha256_of, write_bytes
from common.images import BrokenImageError, verify_download

_LONGEST_PREFIX = 40


class BadImage(Exception):
    """The bytes are no image that can be kept; the message says why."""


@dataclass(frozen=True)
class DownloadedImage:
    """Bytes that were decoded without problem."""

    content: bytes
    suffix: str
    size_px: tuple[int, int]
    sha256: str


def verified(content: bytes) -> DownloadedImage:
    """`content` as an image. Raises BadImage unless it is a whole, still PNG, JPEG or WebP that decodes."""
    try:
        image_format, size_px = verify_download(content)
    except BrokenImageError as error:
        raise BadImage(f"it {error}") from None
    return DownloadedImage(content, IMAGE_FORMATS[image_format][0], size_px, hashlib.sha256(content).hexdigest())


class ImageStore:
    """dataset/images/ and its manifest."""

    def __init__(self, folder: DatasetFolder):
        self._folder = folder
        remove_partial_files(folder.images)
        self._listed = {line["sha256"]: line for line in read_json_lines(folder.manifest) if _names_a_image(line)}

    def missing(self) -> int:
        """How many images of the manifest do not lie in the folder any more."""
        return sum(not (self._folder.root / line["file"]).exists() for line in self._listed.values())

    def line_for(self, image: DownloadedImage, prefix: str, about: dict[str, Any]) -> dict[str, Any]:
        """The manifest line that `image` will have; `about` is what the collector knows of it."""
        name = f"{safe_prefix(prefix)}_{image.sha256[:12]}{image.suffix}"
        if (self._folder.images / name).exists():
            name = f"{safe_prefix(prefix)}_{image.sha256}{image.suffix}"
        return {"file": f"images/{name}", "sha256": image.sha256, "size_px": list(image.size_px), **about}

    def holds(self, line: dict[str, Any]) -> bool:
        """Whether these bytes are in the data set; a file without a manifest line gets `line`."""
        if line["sha256"] in self._listed:
            return True
        lying = self._unlisted.pop(line["sha256"], None)
        if lying is None:
            return False
        self._list({**line, "file": lying.relative_to(self._folder.root).as_posix()})
        return True

    def put(self, image: DownloadedImage, line: dict[str, Any]) -> bool:
        """Store the image and then its line; False if its bytes were there already."""
        if self.holds(line):
            return False
        write_bytes(self._folder.root / line["file"], image.content)
        self._list(line)
        return True

    def _list(self, line: dict[str, Any]) -> None:
        append_json_line(self._folder.manifest, line)
        self._listed[line["sha256"]] = line

    @cached_property
    def _unlisted(self) -> dict[str, Path]:
        """SHA-256 -> file, for the images that have no line in the manifest."""
        listed = {line["file"] for line in self._listed.values()}
        paths = (image.path for image in find_images(self._folder.images))
        return {sha256_of(path): path for path in paths if path.relative_to(self._folder.root).as_posix() not in listed}


def _names_a_image(line: dict[str, Any]) -> bool:
    """Whether a line of the manifest is whole enough to be used; a damaged one is passed over."""
    return isinstance(line.get("file"), str) and isinstance(line.get("sha256"), str)


def safe_prefix(text: str) -> str:
    """`text` as the beginning of a file name: letters, digits, `-` and `_`, not too long, never empty."""
    words = re.sub(r"[^\w-]+", "_", unicodedata.normalize("NFC", text))
    return words.strip("_-")[:_LONGEST_PREFIX].strip("_-") or "picture"
