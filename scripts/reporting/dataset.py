"""What the report shows of DATASET_DIR: every image with its caption, likeness and flaws, and how often tags and traits occur."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from common.captions import UnusableCaptionError, in_lines, in_one_line, read_caption
from common.dataset_layout import DatasetFolder, ImageFile, find_regularization_images, name_in, select_images
from common.files import as_object
from common.project import SharedDataSettings
from common.thumbnails import Thumbnails
from common.triggers import classes_of
from reporting.records import Records, as_number, as_numbers

_CLOSENESS = "full half close"


@dataclass(frozen=True)
class DatasetImage:
    """An image as the contact sheet shows it."""

    name: str
    thumbnail: str
    """A data URI; empty if the image cannot be read."""
    caption: str
    """Several are separated by line feeds."""
    flaws: tuple[str, ...]
    repeats: int
    is_excluded: bool
    """exclude.txt names it."""
    likeness: float | None
    """To the other images; None: it cannot be told, or was not measured."""
    to_reference: float | None
    framing: str
    """close, half or full; empty if no face was found."""
    why: str
    """Why there is no likeness; empty if there is one, or it was not measured."""
    has_mask: bool = False
    """The thumbnail shows the outline of its mask."""

    @property
    def exclusion(self) -> str:
        """The line of exclude.txt that leaves this image out."""
        return f"{self.name}  # {'; '.join(self.flaws)}" if self.flaws else self.name


@dataclass(frozen=True)
class Concept:
    """What one trigger word stands for."""

    trigger: str
    class_word: str
    """Empty if no folder names it."""
    images: int
    samples: int
    """Per epoch."""
    traits: dict[str, float]
    """Trait of the person -> share of the images, as the caption stage found it."""
    pruned: Collection[str]
    """Those traits that were left out of the captions."""


@dataclass(frozen=True)
class Dataset:
    """The data set as it is now, not as it was when the LoRA was trained."""

    images: tuple[DatasetImage, ...] = ()
    tags: tuple[tuple[str, int], ...] = ()
    """Tag and number of captions, the most frequent first, without the trigger word."""
    concepts: tuple[Concept, ...] = ()
    """Those of the images that are not excluded."""
    regularization: int = 0
    """Number of regularization images."""
    framing: dict[str, float] = field(default_factory=dict)
    """close, half, full -> share of the images; empty if the faces were not compared."""
    ceiling: float | None = None
    """Mean likeness of the images to each other."""
    is_checked: bool = False
    """The caption stage has looked for flaws."""
    unused: dict[str, str] = field(default_factory=dict)
    """File or folder beside the images that is not used -> what it is."""
    unreadable: tuple[str, ...] = ()
    """Records that cannot be read."""

    @property
    def captioned(self) -> int:
        return sum(bool(image.caption) for image in self.images)

    @property
    def flagged(self) -> list[DatasetImage]:
        """Images with flaws that are not excluded."""
        return [image for image in self.images if image.flaws and not image.is_excluded]

    @property
    def others(self) -> list[DatasetImage]:
        """The other images, the excluded ones last."""
        others = [image for image in self.images if not image.flaws or image.is_excluded]
        return sorted(others, key=lambda image: image.is_excluded)

    @property
    def masked(self) -> int:
        return sum(image.has_mask for image in self.images)

    @property
    def excluded(self) -> int:
        return sum(image.is_excluded for image in self.images)

    @property
    def typical(self) -> DatasetImage | None:
        """The image that stands for the data set: of those that show the person closest, the one most like the others."""
        shown = [image for image in self.images if image.thumbnail and not image.is_excluded]
        return max(shown, key=lambda image: (not image.flaws, _CLOSENESS.find(image.framing), image.likeness or 0.0), default=None)


def read_dataset(folder: DatasetFolder, trigger: str, settings: SharedDataSettings) -> Dataset:
    """Read images, captions and records. What is missing or half written is left out. `settings`: how training reads them."""
    records = Records(folder.root)
    flaws, likeness, traits = (records.json(path) for path in (folder.audit, folder.likeness, folder.traits))
    selection = select_images(folder)
    used = {image.path for image in selection.images}
    found, flagged = as_object(likeness.get("images")), as_object(flaws.get("flagged"))
    images, files = [], selection.found
    masks = {file.path: file.masks[0] if file.masks else file.path for file in files if file.masks or settings.alpha == "mask"}
    with Thumbnails(folder.thumbnails) as thumbnails:
        for file, thumbnail in zip(files, thumbnails.of_all((file.path for file in files), masks=masks), strict=True):
            name = name_in(folder.images, file.path)
            entry = as_object(flagged.get(name))
            described = _described(as_object(entry.get("flaws", entry)), as_object(found.get(name)))
            is_excluded, caption = file.path not in used, _caption(file, folder, per_line=settings.caption_per_line)
            has_mask = file.path in thumbnails.outlined
            about = {"repeats": file.folder.repeats, "is_excluded": is_excluded, "has_mask": has_mask}
            images.append(DatasetImage(name, thumbnail, caption, **about, **described))
    alone = flaws.get("captions_without_picture")
    unused = dict.fromkeys(alone if isinstance(alone, list) else (), "a caption without an image")
    unused |= as_object(flaws.get("not_looked_at"))
    return Dataset(
        images=tuple(images),
        tags=_tags(
            [image.caption for image in images if not image.is_excluded], {file.folder.trigger or trigger for file in files}
        ),
        concepts=tuple(_concepts([file for file in files if file.path in used], trigger, traits)),
        regularization=len(find_regularization_images(folder)),
        framing=as_numbers(likeness.get("framing")),
        ceiling=as_number(likeness.get("ceiling")),
        is_checked=bool(flaws),
        unused={str(name): str(what) for name, what in unused.items()},
        unreadable=tuple(records.unreadable),
    )


def _described(flaws: Mapping[str, Any], likeness: Mapping[str, Any]) -> dict[str, Any]:
    """What the caption stage recorded of an image, as fields of DatasetImage."""
    return {
        "flaws": tuple(" ".join(f"{kind}: {flaw}".split()) for kind, flaw in flaws.items()),
        "likeness": as_number(likeness.get("likeness")),
        "to_reference": as_number(likeness.get("to_reference")),
        "framing": str(likeness.get("framing") or ""),
        "why": str(likeness.get("why") or ""),
    }


def _caption(file: ImageFile, folder: DatasetFolder, *, per_line: bool) -> str:
    """The caption that training reads, or several, separated by line feeds; empty if there is none that can be read."""
    text = ""
    try:
        text = read_caption(file.caption_to_read, folder.root)
    except FileNotFoundError:
        text = file.listed_caption or ""
    except (UnusableCaptionError, OSError):
        pass
    return in_lines(text) if per_line else in_one_line(text)


def _concepts(files: Sequence[ImageFile], trigger: str, record: Mapping[str, Any]) -> Iterator[Concept]:
    """The concepts of these images; `record` is what the caption stage wrote of their traits."""
    records = as_object(record.get("concepts"))
    for word, class_word in classes_of(dict.fromkeys(file.folder for file in files), trigger).items():
        own = [file for file in files if (file.folder.trigger or trigger) == word]
        traits = as_object(records.get(word)) if records else record
        pruned = as_numbers(traits.get("pruned"))
        shares = dict(sorted((pruned | as_numbers(traits.get("kept"))).items(), key=lambda item: -item[1]))
        yield Concept(word, class_word, len(own), sum(file.folder.repeats for file in own), shares, tuple(pruned))


def _tags(captions: list[str], triggers: Collection[str]) -> tuple[tuple[str, int], ...]:
    lines = [line for caption in captions for line in caption.split("\n")]
    counts = Counter(tag for caption in lines for tag in dict.fromkeys(map(str.strip, caption.split(","))) if tag)
    words = {trigger.casefold() for trigger in triggers}
    return tuple((tag, count) for tag, count in counts.most_common() if tag.casefold() not in words)
