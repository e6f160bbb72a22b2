"""Names and meaning of the files in DATASET_DIR: which of them are images, where their captions and the records are.

Stages share the data set only through these files. A file gets its name when it is complete, so that a file that exists
can be trusted. Standard library only.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from common.files import remove_partial_files

IMAGE_FORMATS = {"png": (".png",), "jpeg": (".jpg", ".jpeg"), "webp": (".webp",), "bmp": (".bmp",)}
"""Formats of images in a data set -> the suffixes of their files, the usual one first."""
IMAGE_SUFFIXES = tuple(suffix for suffixes in IMAGE_FORMATS.values() for suffix in suffixes)
CAPTION_SUFFIX = ".txt"
CAPTION_SUFFIXES = (CAPTION_SUFFIX, ".caption")
"""In any case. The caption stage writes the first; if an image has captions of both kinds, training reads the first."""

_MAGIC_BYTES = {"png": b"\x89PNG\r\n\x1a\n", "jpeg": b"\xff\xd8\xff", "bmp": b"BM"}
_REPEATS_FOLDER = re.compile(r"(\d{1,5})_.+")


class DatasetFolder:
    """The path of every file and folder in `DATASET_DIR`."""

    def __init__(self, root: Path):
        self.root = root
        # For the user: images with their captions, and one JSON line for each collected image.
        self.images = root / "images"
        self.manifest = root / "manifest.jsonl"
        # Records of the stages: what the collect stage sent and received, ...
        self.records = root / ".loracat"
        self.collect_log = self.records / "collect.jsonl"
        # ... every change that the caption stage made to a caption, measurements of the images, the flaws that were found
        # (training skips such images on request), the share of images with each trait, and the tagger's probabilities.
        self.caption_log = self.records / "captions.jsonl"
        self.image_index = self.records / "pictures.json"
        self.audit = self.records / "audit.json"
        self.traits = self.records / "traits.json"
        self.tag_cache = self.records / "tags"

    def remove_leftovers(self) -> None:
        """Remove the temporary files that killed runs left anywhere in the data set, except those of the last minute."""
        for folder in (self.root, self.images, *self.images.glob("*/"), self.records, *self.tag_cache.glob("*/")):
            remove_partial_files(folder)


@dataclass(frozen=True)
class ImageFile:
    """An image of the data set; `repeats` is how often one epoch uses it (N in a folder `N_name`, else 1)."""

    path: Path
    repeats: int
    captions: tuple[Path, ...] = ()
    """The files of the same stem with one of CAPTION_SUFFIXES, the first choice first."""

    @property
    def caption_path(self) -> Path:
        """The caption that the caption stage writes: the file of the same stem with CAPTION_SUFFIX, in any case if it exists."""
        written = (path for path in self.captions if path.suffix.lower() == CAPTION_SUFFIX)
        return next(written, self.path.with_suffix(CAPTION_SUFFIX))

    @property
    def caption_to_read(self) -> Path:
        """The caption that training reads."""
        return self.captions[0] if self.captions else self.caption_path


def find_images(folder: Path) -> list[ImageFile]:
    """All images in `folder` and in its `N_name` folders, sorted by relative path.

    Other folders, hidden files and files with another suffix do not belong to the data set. A folder `0_name` holds images
    that are excluded from it.
    """
    children = list(folder.iterdir()) if folder.is_dir() else []
    found = [(path, 1) for path in children]
    for child in children:
        if repeats := repeats_of(child):
            found += [(path, repeats) for path in child.iterdir()]
    captions = _captions_by_stem([path for path, _ in found])
    images = [
        ImageFile(path, repeats, captions.get(path.with_suffix(""), ()))
        for path, repeats in found
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    ]
    return sorted(images, key=lambda image: image.path.relative_to(folder).as_posix())


def _captions_by_stem(paths: list[Path]) -> dict[Path, tuple[Path, ...]]:
    """Path without suffix -> its captions: `x.txt` comes before `x.TXT`, and that before `x.caption`."""
    captions: dict[Path, tuple[Path, ...]] = {}
    for suffix in CAPTION_SUFFIXES:
        of_suffix = [path for path in paths if path.suffix.lower() == suffix]
        for path in sorted(of_suffix, key=lambda path: (path.suffix != suffix, path.name)):
            captions[path.with_suffix("")] = (*captions.get(path.with_suffix(""), ()), path)
    return captions


def repeats_of(folder: Path) -> int | None:
    """N of a folder `N_name`, None for every other file or folder."""
    match = _REPEATS_FOLDER.fullmatch(folder.name)
    return int(match[1]) if match and folder.is_dir() else None


def caption_owners(images: Iterable[ImageFile]) -> dict[Path, ImageFile]:
    """Caption file -> the image that it belongs to: the first one, where several images have the same stem."""
    owners: dict[Path, ImageFile] = {}
    for image in images:
        owners.setdefault(image.caption_path, image)
    return owners


def name_in(folder: Path, path: Path) -> str:
    """The name of a file in `folder` in the records: its relative path, with bytes that are not UTF-8 as escapes."""
    return os.fsencode(path.relative_to(folder)).decode("utf-8", "backslashreplace")


def sniff_image_format(head: bytes) -> str | None:
    """The format (a key of IMAGE_FORMATS) that the magic bytes in the first 12 bytes of a file stand for, None if unknown."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    return next((name for name, magic in _MAGIC_BYTES.items() if head.startswith(magic)), None)
