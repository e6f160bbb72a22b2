"""The contract of the shared folders: which files are images, where a caption lies, what the manifest says.

Standard library only: every stage meets the others here and nowhere else. A file gets its name when it is whole,
so "exists" never has to mean "maybe complete".
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

IMAGE_FORMATS = {"png": (".png",), "jpeg": (".jpg", ".jpeg"), "webp": (".webp",), "bmp": (".bmp",)}
"""Formats of images in a data set -> the suffixes of their files, the usual one first."""
IMAGE_SUFFIXES = tuple(suffix for suffixes in IMAGE_FORMATS.values() for suffix in suffixes)
CAPTION_SUFFIX = ".txt"


RECORD_FOLDER = ".loracat"


_MAGIC_BYTES = (("png", b"\x89PNG\r\n\x1a\n"), ("jpeg", b"\xff\xd8\xff"), ("bmp", b"BM"))


_REPEATS_FOLDER = re.compile(r"(\d{1,5})_.+")


@dataclass(frozen=True)
class DatasetFolder:
    """`DATASET_DIR` and what lies where in it."""

    root: Path

    @property
    def images(self) -> Path:
        """Images and their captions."""
        return self.root / "images"

    @property
    def manifest(self) -> Path:
        """One JSON line per collected image."""
        return self.root / "manifest.jsonl"

    @property
    def records(self) -> Path:
        """What the stages write down for themselves."""
        return self.root / RECORD_FOLDER

    @property
    def audit(self) -> Path:
        """What the caption stage found to be wrong with images; training leaves those out if it is told to."""
        return self.records / "audit.json"


@dataclass(frozen=True)
class ImageFile:
    """An image of the data set; `repeats` is how often one epoch shows it (`N_name` folders, else 1)."""

    path: Path
    repeats: int

    @property
    def caption_path(self) -> Path:
        """The same stem with `.txt`."""
        return caption_path(self.path)


def caption_path(image: Path) -> Path:
    """Where the caption of `image` lies."""
    return image.with_suffix(CAPTION_SUFFIX)


def caption_owners(images: Iterable[ImageFile]) -> dict[Path, ImageFile]:
    """Where captions lie -> the image that each belongs to: of images with the same stem the first."""
    owners: dict[Path, ImageFile] = {}
    for image in images:
        owners.setdefault(image.caption_path, image)
    return owners


def name_in(folder: Path, path: Path) -> str:
    """What the records call a file in `folder`: its relative path; bytes of a name that are not UTF-8 become escapes."""
    return os.fsencode(path.relative_to(folder)).decode("utf-8", "backslashreplace")


def find_images(folder: Path) -> list[ImageFile]:
    """All images in `folder` and in its `N_name` folders, sorted by relative path.

    Other folders, hidden files and files with another suffix are not images of the data set. A folder `0_name`
    holds images that are laid aside.
    """
    found = [ImageFile(path, 1) for path in _image_files(folder)]
    for child in folder.iterdir() if folder.is_dir() else ():
        if repeats := repeats_of(child):
            found += [ImageFile(path, repeats) for path in _image_files(child)]
    return sorted(found, key=lambda image: image.path.relative_to(folder).as_posix())


def repeats_of(folder: Path) -> int | None:
    """N of a folder `N_name`, None for every other entry."""
    match = _REPEATS_FOLDER.fullmatch(folder.name)
    return int(match[1]) if match and folder.is_dir() else None


def _image_files(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file():
            yield path


def sniff_image_format(head: bytes) -> str | None:
    """`png`, `jpeg`, `webp` or `bmp` by the magic bytes in the first 12 bytes of a file, else None."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    return next((name for name, magic in _MAGIC_BYTES if head.startswith(magic)), None)
