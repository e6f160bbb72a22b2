"""What the report shows of DATASET_DIR: every image with its caption and flaws, and how often each tag and trait occurs."""

import contextlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.captions import UnusableCaptionError, in_one_line, read_caption
from common.dataset_layout import DatasetFolder, ImageFile, find_images, name_in
from common.files import parse_json, read_file
from reporting.thumbnails import Thumbnails


@dataclass(frozen=True)
class DatasetImage:
    """An image as the contact sheet shows it."""

    name: str
    thumbnail: str
    """A data URI; empty if the image cannot be read."""
    caption: str
    flaws: tuple[str, ...]
    repeats: int


@dataclass(frozen=True)
class Dataset:
    """The data set as it is now, not as it was when the LoRA was trained."""

    images: tuple[DatasetImage, ...] = ()
    tags: tuple[tuple[str, int], ...] = ()
    """Tag and number of captions, the most frequent first, without the trigger word."""
    traits: dict[str, float] = field(default_factory=dict)
    """Trait of the person -> share of the images, as the caption stage found it."""

    @property
    def captioned(self) -> int:
        return sum(bool(image.caption) for image in self.images)

    @property
    def flagged(self) -> int:
        return sum(bool(image.flaws) for image in self.images)


def read_dataset(folder: DatasetFolder, trigger: str) -> Dataset:
    """Read images, captions and records. What is missing or half written is left out."""
    files = find_images(folder.images)
    flaws = _object(_read_json(folder.audit), "flagged")
    traits = _read_json(folder.traits)
    shares = {**_object(traits, "pruned"), **_object(traits, "kept")}
    with Thumbnails(folder.thumbnails) as thumbnails:
        images = tuple(_image(file, folder, flaws, thumbnails) for file in files)
    counts = Counter(tag for image in images for tag in dict.fromkeys(map(str.strip, image.caption.split(","))) if tag)
    counts = Counter({tag: count for tag, count in counts.items() if tag.casefold() != trigger.casefold()})
    return Dataset(images, tuple(counts.most_common()), {str(k): v for k, v in shares.items() if isinstance(v, int | float)})


def _image(file: ImageFile, folder: DatasetFolder, flaws: dict[str, Any], thumbnails: Thumbnails) -> DatasetImage:
    name = name_in(folder.images, file.path)
    caption = ""
    with contextlib.suppress(UnusableCaptionError, OSError):
        caption = in_one_line(read_caption(file.caption_path, folder.root))
    found = _object(flaws, name)
    return DatasetImage(
        name, thumbnails.of(file.path), caption, tuple(f"{kind}: {flaw}" for kind, flaw in found.items()), file.repeats
    )


def _read_json(path: Path) -> Any:
    """The content of a record; None if there is none yet, or only half of it."""
    with contextlib.suppress(OSError, ValueError):
        return parse_json(read_file(path))
    return None


def _object(record: Any, key: str) -> dict[str, Any]:
    value = record.get(key) if isinstance(record, dict) else None
    return value if isinstance(value, dict) else {}
